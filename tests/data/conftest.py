"""What tests of the data share: a tokenizer of ours."""

import pytest

from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.training import train_tokenizer
from tests.data.texts import code


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    learned = train_tokenizer(code()[:40], 800, tmp_path_factory.mktemp("ours"))
    assert isinstance(learned, SentencePieceTokenizer)
    return learned
