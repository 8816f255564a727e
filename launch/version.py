"""The version of Ziggurat."""

import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """Returns the version of this checkout, or else of the installed package."""
    project = ROOT / "pyproject.toml"
    if not project.exists():
        return metadata.version("ziggurat")
    return str(tomllib.loads(project.read_text())["project"]["version"])
