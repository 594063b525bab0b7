"""Called by mkdocs: writes the methods' pages and puts them into the navigation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Before anything is read: the pages, and the entry Methods of the navigation."""
    here = str(Path(__file__).resolve().parent)
    if here not in sys.path:  # mkdocs takes the folder of a hook off the path again
        sys.path.insert(0, here)
    import method_pages

    pages = [f"methods/{path.name}" for path in method_pages.write()]
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [{"All methods": pages[0]}, *pages[1:]]
    return config
