"""Any text comes back, code compresses, and training is deterministic."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.sentencepiece_tokenizer import MAX_PART_CHARACTERS, PART_CHARACTERS
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer
from tests.data.texts import NASTY, code


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    training = [text for i, text in enumerate(code()) if i % 8]
    return train_tokenizer(training, 4096, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_what_breaks_tokenizers_comes_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert b"".join(tokenizer.token_bytes(int(i)) for i in ids) == text.encode()


@given(text=st.text() | st.text(alphabet=" \n\t\r\u2581\ue00001ab<>|=-", max_size=200))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(min_size=1))
@example("\u2585")
@example("\0")
def test_no_text_keeps_its_document_from_the_training(tmp_path_factory: pytest.TempPathFactory, text: str):
    words = "quick brown foxes jump over lazy dogs " * 20
    tokenizer = train_tokenizer([words + text + words], 330, tmp_path_factory.mktemp("tokenizer"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("quick")) < 5


def test_lone_surrogates_are_refused(tokenizer: Tokenizer):
    for text in ("a \ud800 b", "a b " * PART_CHARACTERS + "\ud800"):
        with pytest.raises(ValueError):
            tokenizer.encode(text)


def test_code_compresses(tokenizer: Tokenizer):
    held_out = code()[::8]
    tokens = sum(len(tokenizer.encode(text)) for text in held_out)
    assert sum(len(text.encode()) for text in held_out) / tokens > 3.2
    assert len(tokenizer.encode("\n        ")) == 1


def encode_in_parts(tokenizer: Tokenizer, text: str, part: int, longest: int) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizer.sentencepiece_tokenizer.PART_CHARACTERS", part)
        patch.setattr("data.tokenizer.sentencepiece_tokenizer.MAX_PART_CHARACTERS", longest)
        return tokenizer.encode(text)


def encode_whole(tokenizer: Tokenizer, text: str) -> np.ndarray:
    ids = encode_in_parts(tokenizer, text, 2**40, 2**40)
    assert tokenizer.decode(ids) == text
    return ids


def test_the_ids_of_a_long_text_are_those_of_the_whole(tokenizer: Tokenizer):
    line = "value = [0, 1, 2]; " * 20_000
    ids = tokenizer.encode(line)
    np.testing.assert_array_equal(ids, encode_whole(tokenizer, line))
    assert len(ids) < len(line) / 2
    text = "".join(code()[::4])
    for long in (text, text.replace(" ", ""), "\ue000 \u2581\n".join(code()[:20])):
        np.testing.assert_array_equal(tokenizer.encode(long), encode_whole(tokenizer, long))


@given(text=st.text() | st.text(alphabet=" \n\t\r\u2581\ue00001ab<>|=-", max_size=200) | st.sampled_from(NASTY))
def test_cutting_wherever_it_may_changes_no_id(tokenizer: Tokenizer, text: str):
    np.testing.assert_array_equal(encode_in_parts(tokenizer, text, 1, 2**20), encode_whole(tokenizer, text))


def test_code_is_cut_the_same_in_short_parts(tokenizer: Tokenizer):
    for text in code()[::8]:
        np.testing.assert_array_equal(encode_in_parts(tokenizer, text, 1, 2**20), encode_whole(tokenizer, text))


@given(text=st.text(alphabet=" \n\u2581\ue0000a=", max_size=200))
def test_a_text_without_a_place_to_cut_comes_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(encode_in_parts(tokenizer, text, 2, 5)) == text


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("", 0),
        ("=" * (2 * MAX_PART_CHARACTERS + 7), MAX_PART_CHARACTERS),
        ("value = [0, 1, 2]; " * 20_000, PART_CHARACTERS + 40),
        ("値は零です" * 50_000, PART_CHARACTERS + 40),
        ("a b" + "=" * (MAX_PART_CHARACTERS + PART_CHARACTERS), MAX_PART_CHARACTERS),
    ],
    ids=["empty", "a run", "words", "no spaces", "a run after words"],
)
def test_parts_are_bounded_and_are_their_own_parts(tokenizer: Tokenizer, text: str, longest: int):
    parts = list(tokenizer.parts(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= longest
    for part in parts[:3] + parts[-3:]:
        assert list(tokenizer.parts(part)) == [part]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_up_to_the_limit_is_never_cut_where_it_matters(tokenizer: Tokenizer):
    run = "=" * MAX_PART_CHARACTERS
    assert list(tokenizer.parts(run)) == [run]
    assert len(list(tokenizer.parts(run + "="))) == 2


def test_all_texts_are_encoded_lazily_and_in_order(tokenizer: Tokenizer):
    taken = []

    def texts() -> Iterator[str]:
        for text in code():
            taken.append(text)
            yield text

    encoded = tokenizer.encode_all(texts())
    for i, text in enumerate(code()[:20], start=1):
        np.testing.assert_array_equal(next(encoded), tokenizer.encode(text))
        assert len(taken) == i


def test_long_texts_are_learned_from_not_dropped(tmp_path: Path):
    words = [f"qzx{i % 7}" for i in range(50_000)]
    learned = train_tokenizer([" ".join(words)], 400, tmp_path)
    assert len(learned.encode("qzx3 qzx5")) <= 4


def test_the_same_texts_give_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path):
    training = [text for i, text in enumerate(code()) if i % 8]
    again = train_tokenizer(training, 4096, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.folder / "tokenizer.model").read_bytes() == (tokenizer.folder / "tokenizer.model").read_bytes()
    assert train_tokenizer(training[:-9], 4096, tmp_path / "other").fingerprint != again.fingerprint


def test_a_small_text_gets_the_vocabulary_that_it_supports_and_it_says_so(tmp_path: Path, caplog):
    with caplog.at_level("INFO", "ziggurat"):
        small = train_tokenizer(["to be, or not to be: that is the question"], 4096, tmp_path)
    assert 256 < small.vocab_size < 400
    assert f"the text supports {small.vocab_size} token ids; 4096 were asked for" in caplog.text
    assert small.decode(small.encode("übermäßig 🙂")) == "übermäßig 🙂"


@pytest.mark.parametrize("texts", [[], ["", "  \n"], ["\0\0", " \0"]])
def test_no_text_is_an_error(texts: list[str], tmp_path: Path):
    with pytest.raises(InputError, match="no text to train"):
        train_tokenizer(texts, 4096, tmp_path)


def test_a_vocabulary_too_small_for_the_characters_is_an_error(tmp_path: Path):
    text = "".join(map(chr, range(0x4E00, 0x4F00)))
    with pytest.raises(InputError, match=r"tokenizer\.vocab_size = 320 is too small"):
        train_tokenizer([text * 20], 320, tmp_path)


def test_missing_and_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.model"
    for content in (b"", b"nonsense", (tokenizer.folder / "tokenizer.model").read_bytes()[:1000]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is damaged"):
            load_tokenizer(tmp_path)


def test_ids_that_do_not_exist_are_refused(tokenizer: Tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.decode([wrong])
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_it_needs_no_jax(tokenizer: Tokenizer):
    program = "import sys; import data.tokenizer.folder, data.tokenizer.threads; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
