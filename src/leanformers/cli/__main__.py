from leanformers.cli import main

main()
