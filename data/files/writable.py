"""Checks before files are written to a folder."""

import os
from pathlib import Path


def why_not_writable(folder: Path) -> str:
    """Returns why a folder, which need not exist yet, cannot be written to; an empty text where it can."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    return "" if os.access(existing, os.W_OK) else f"{existing} cannot be written to"
