"""Transformers reads the tokenizer and gives the same ids (C7)."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer.folder import load_tokenizer
from data.tokenizer.to_huggingface import write_huggingface_tokenizer
from data.tokenizer.tokenizer import FIM_TOKENS
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


def test_marks_of_a_middle_have_the_same_ids_and_are_no_text(tmp_path: Path):
    transformers = require("transformers")
    ours = train_tokenizer(code()[:10], 800, tmp_path / "ours", FIM_TOKENS)
    (tmp_path / "theirs").mkdir()
    write_huggingface_tokenizer(ours, tmp_path / "theirs", context=256)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ids = (theirs.fim_prefix_token_id, theirs.fim_suffix_token_id, theirs.fim_middle_token_id)
    assert ids == ours.fim_ids() == tuple(theirs.convert_tokens_to_ids([*FIM_TOKENS]))
    assert set(FIM_TOKENS) <= set(theirs.all_special_tokens)
    P, S, M = FIM_TOKENS
    for text in (f"a{P}b", f"{P}{S}{M}", f" {M} ", code()[20][:500]):
        assert theirs(text)["input_ids"] == ours.encode_with_bos(text)
        assert not {*ids} & {*ours.encode(text).tolist()}
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    # A prompt whose marks are meant, as Transformers reads it.
    prompt = theirs(f"{P}def f{S}return{M}", split_special_tokens=False)["input_ids"]
    expected = [ours.eos_id, ids[0], *ours.encode("def f"), ids[1], *ours.encode("return"), ids[2]]
    assert prompt == expected
    assert load_tokenizer(tmp_path / "theirs").fim_tokens == FIM_TOKENS
