"""Heavy libraries that some tests compare with, and programs that they start."""

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest


def require(name: str) -> ModuleType:
    """Import a peer. Where it is missing the test is skipped; with ZIGGURAT_REQUIRE_PEERS=1 it fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        _missing(name, "pip install -e '.[peers]'")


def require_program(name: str) -> str:
    """The path of a program. Where it is missing the test is skipped; with ZIGGURAT_REQUIRE_PEERS=1 it fails."""
    return shutil.which(name) or _missing(name, f"apt-get install {name}")


def _missing(name: str, remedy: str) -> NoReturn:
    if os.environ.get("ZIGGURAT_REQUIRE_PEERS") == "1":
        pytest.fail(f"the peer {name} is not installed, and ZIGGURAT_REQUIRE_PEERS=1")
    pytest.skip(f"the peer {name} is not installed: {remedy}")
