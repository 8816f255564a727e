"""Transformers reads the tokenizer and gives the same ids (C7)."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer.folder import load_tokenizer
from data.tokenizer.to_huggingface import write_huggingface_tokenizer
from data.tokenizer.training import train_tokenizer
from tests.data.texts import NASTY, code
from tests.peers import require


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory):
    transformers = require("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = train_tokenizer([text for i, text in enumerate(code()) if i % 8], 4096, folder / "ours")
    exported = folder / "theirs"
    exported.mkdir()
    write_huggingface_tokenizer(ours, exported, context=256)
    return ours, transformers.AutoTokenizer.from_pretrained(exported), exported


def same(both, text: str) -> None:
    ours, theirs, _ = both
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode_with_bos(text)
    assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_nasty_texts(both, text: str):
    same(both, text)


@given(text=st.text() | st.text(alphabet=" \n\t\r\u2581\ue00001ab<>|=-_#'\"", max_size=300))
def test_any_text(both, text: str):
    same(both, text)


def test_files_of_code(both):
    for text in code()[::8]:
        same(both, text)


def test_special_tokens_length_and_our_own_file(both):
    ours, theirs, exported = both
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos_id
    assert theirs.model_max_length == 256
    assert theirs.decode([ours.eos_id], skip_special_tokens=True) == ""
    assert load_tokenizer(Path(exported)).fingerprint == ours.fingerprint
