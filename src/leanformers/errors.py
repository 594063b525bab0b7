"""The one error that users see: a sentence, not a traceback."""


class LeanError(ValueError):
    """Bad input, said in one sentence that names the file, field or layer and the remedy.

    The command line prints it and exits with code 2.
    """
