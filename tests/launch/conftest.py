"""One finished small run for all tests of what comes after."""

from pathlib import Path

import pytest

from tests.launch.small_run import here, write_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps, with checkpoints of steps 8 and 12 and its export."""
    folder = tmp_path_factory.mktemp("finished")
    assert here("pretrain", f"--config={write_config(folder)}") == 0
    return folder / "run"
