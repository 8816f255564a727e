"""Finished small runs for all tests of what comes after."""

from pathlib import Path

import pytest

from tests.launch.small_chats import EXAMPLE, flags_of
from tests.launch.small_run import here, write_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps, with checkpoints of steps 8 and 12 and its export."""
    folder = tmp_path_factory.mktemp("finished")
    assert here("pretrain", f"--config={write_config(folder)}") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on conversations and text, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("chatted")
    assert here("pretrain", *flags_of(folder), f"--config.data.chat_template={EXAMPLE}") == 0
    return folder / "run"
