"""Heavy libraries that some tests compare with."""

import importlib
import os
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a peer. Where it is missing the test is skipped; with ZIGGURAT_REQUIRE_PEERS=1 it fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if os.environ.get("ZIGGURAT_REQUIRE_PEERS") == "1":
            pytest.fail(f"the peer {name} is not installed, and ZIGGURAT_REQUIRE_PEERS=1")
        pytest.skip(f"the peer {name} is not installed: pip install -e '.[peers]'")
