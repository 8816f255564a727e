"""What tests of the data share: a tokenizer of ours, and those of others with their chat templates."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from data.formats.template import TODAY
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.training import train_tokenizer
from tests.data import chat_templates
from tests.data.chat_templates import PUBLISHED
from tests.data.texts import code
from tests.peers import require


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    learned = train_tokenizer(code()[:40], 800, tmp_path_factory.mktemp("ours"))
    assert isinstance(learned, SentencePieceTokenizer)
    return learned


@pytest.fixture(scope="module")
def folders(ours: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {name: chat_templates.write(root / name, each, ours) for name, each in PUBLISHED.items()}


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of Transformers' templates stands still as ours does."""
    module = require("transformers.utils.chat_template_utils")

    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Still":
            return cls(TODAY.year, TODAY.month, TODAY.day)

    monkeypatch.setattr(module, "datetime", Still)
