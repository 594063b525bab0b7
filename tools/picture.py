"""Draws the frontier of a run: python tools/picture.py runs/demo docs/frontier.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from leanformers.report import write_picture


def main(run: str, target: str) -> None:
    data = json.loads((Path(run) / "frontier.json").read_text("utf-8"))
    print(f"{write_picture(data, target)} written")


if __name__ == "__main__":
    main(*sys.argv[1:])
