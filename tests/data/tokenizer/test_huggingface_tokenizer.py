"""Other people's tokenizers give the ids that Transformers gives, and their text comes back."""

import copy
import json
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.tokenizer.folder import holds_tokenizer, load_tokenizer, write_tokenizer
from data.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.threads import TokenizingThreads
from data.tokenizer.to_huggingface import write_huggingface_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from tests.data import others
from tests.data.texts import NASTY, code
from tests.peers import require

KINDS = ("gpt2", "llama3", "qwen", "llama2", "gemma")


@pytest.fixture(scope="module")
def folders(ours: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    byte_level = {kind: (others.byte_level(kind), others.EOS) for kind in ("gpt2", "llama3", "qwen")}
    fallback = {kind: (others.byte_fallback(kind, ours), "</s>") for kind in ("llama2", "gemma")}
    return {kind: others.write(root / kind, *made) for kind, made in (byte_level | fallback).items()}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]):
    transformers = require("transformers")
    return {kind: transformers.AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def normal(kind: str, text: str) -> str:
    """What comes back of a text."""
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    return text.replace("\u2581", " ") if kind in ("llama2", "gemma") else text


TEXTS = st.text() | st.text(alphabet=" \n\t\r\u2581aeé\u0301<>|/s_'0129", max_size=100) | st.sampled_from(NASTY[:-1])


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_the_ids_are_those_of_transformers_and_the_text_comes_back(loaded, theirs, kind: str, text: str):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == theirs[kind](text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == normal(kind, text)
    whole = b"".join(tokenizer.token_bytes(int(i)) for i in ids)
    assert whole.decode() == (" " if kind == "llama2" and text else "") + normal(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_as_its_tokenizer_says_or_else_after_the_end_of_another(loaded, theirs, kind: str):
    tokenizer, text = loaded[kind], "the cat"
    before = {"llama3": "<|begin|>", "llama2": "<s>", "gemma": "<s>"}.get(kind, others.EOS)
    assert [tokenizer.pieces[i] for i in tokenizer.bos_ids] == [before]
    assert tokenizer.encode_with_bos(text) == [*tokenizer.bos_ids, *tokenizer.encode(text)]
    assert tokenizer.encode_with_bos("") == tokenizer.bos_ids
    assert theirs[kind](text)["input_ids"] == tokenizer.encode_with_bos(text)[kind in ("gpt2", "qwen") :]


@pytest.mark.parametrize("of_file", [False, True])
@pytest.mark.parametrize("of_config", [None, False, True])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_space_comes_before_a_text_where_the_class_puts_one(tmp_path: Path, name: str, of_config, of_file: bool):
    settings = copy.deepcopy(others.byte_level("gpt2"))
    settings["pre_tokenizer"]["add_prefix_space"] = of_file
    folder = others.write(tmp_path / "theirs", settings, others.EOS)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    config |= {} if of_config is None else {"add_prefix_space": of_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    copied = write_tokenizer(tokenizer.files(), tmp_path / "copy")
    assert copied.fingerprint == tokenizer.fingerprint
    theirs = require("transformers").AutoTokenizer.from_pretrained(folder)
    for text in ("the cat", " the cat", "", "a <think>b"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).tolist() == copied.encode(text).tolist() == ids
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@given(st.data())
def test_what_stands_before_a_text_is_what_its_template_puts_there(tmp_path_factory, data):
    """Any tokens: pieces, added ones, special or not, in any number; what the template puts behind a text is left."""
    settings = copy.deepcopy(others.byte_level("gpt2"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    settings["added_tokens"] += [{"id": 601 + i, "content": f"<{i}>", "special": bool(i), **flags} for i in range(2)]
    ids = {"<0>": 601, "<1>": 602, "<|begin|>": 0, "<|endoftext|>": 1, "a": settings["model"]["vocab"]["a"]}
    before, behind = (data.draw(st.lists(st.sampled_from(sorted(ids)), max_size=3)) for _ in range(2))
    special = lambda names: [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    single = [*special(before), {"Sequence": {"id": "A", "type_id": 0}}, *special(behind)]
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
    }
    folder = others.write(tmp_path_factory.mktemp("template"), settings, others.EOS)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_ids == ([ids[name] for name in before] or [tokenizer.eos_id])
    theirs = require("transformers").AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]
    assert [*(tokenizer.bos_ids if before else []), *tokenizer.encode("the cat")] == theirs[: len(theirs) - len(behind)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_no_text_and_what_looks_like_them_is(loaded, theirs, kind: str):
    tokenizer = loaded[kind]
    assert tokenizer.vocab_size == len(theirs[kind])
    assert tokenizer.eos_id == theirs[kind].eos_token_id
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    text = f"a{tokenizer.pieces[tokenizer.eos_id]}b <s> <0x41>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.token_bytes(wrong)
    with pytest.raises(ValueError):
        tokenizer.encode("a \ud800")


def test_added_tokens_that_are_not_special_are_found_in_a_text(loaded):
    tokenizer = loaded["gpt2"]
    ids = tokenizer.encode("a <think> b")
    assert tokenizer.pieces.index("<think>") in ids
    assert tokenizer.decode(ids) == "a <think> b"
    assert tokenizer.token_kinds[tokenizer.pieces.index("<think>")] == "whole"


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_tokenizer(loaded, kind: str, tmp_path: Path):
    assert not holds_tokenizer(tmp_path)
    copy = write_tokenizer(loaded[kind].files(), tmp_path)
    assert holds_tokenizer(tmp_path)
    assert copy.fingerprint == loaded[kind].fingerprint
    assert copy.eos_id == loaded[kind].eos_id
    exported = tmp_path / "export"
    exported.mkdir()
    write_huggingface_tokenizer(copy, exported, context=16)
    assert load_tokenizer(exported).fingerprint == copy.fingerprint
    again = require("transformers").AutoTokenizer.from_pretrained(exported)
    assert (
        again("def f():\n    pass", add_special_tokens=False)["input_ids"] == copy.encode("def f():\n    pass").tolist()
    )


def test_threads_give_the_same_ids(loaded):
    threads = TokenizingThreads(loaded["gpt2"], 2)
    try:
        for text, ids in zip(code()[:5], threads(code()[:5]), strict=True):
            np.testing.assert_array_equal(ids, loaded["gpt2"].encode(text))
    finally:
        threads.close()


def test_ours_is_chosen_where_it_is_and_theirs_beside_another_sentencepiece_model(ours, folders, tmp_path: Path):
    write_huggingface_tokenizer(ours, tmp_path, context=16)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").unlink()
    alone = load_tokenizer(tmp_path)
    assert isinstance(alone, HuggingFaceTokenizer)
    for text in NASTY:
        np.testing.assert_array_equal(alone.encode(text), ours.encode(text))
        assert alone.decode(alone.encode(text)) == text
    assert alone.bos_ids == [alone.eos_id] == ours.bos_ids == [ours.eos_id]
    foreign = (tmp_path / "foreign").resolve()
    others.write(foreign, json.loads((folders["gpt2"] / "tokenizer.json").read_text()), others.EOS)
    (foreign / "tokenizer.model").write_bytes(ANOTHER)
    assert isinstance(load_tokenizer(foreign), HuggingFaceTokenizer)
    (foreign / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=r"tokenizer\.model is damaged, or not made by `ziggurat tokenize`.*next to it"
    ):
        load_tokenizer(foreign)


def another() -> bytes:
    """A SentencePiece model that is not ours."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["to be or not to be"] * 9), model_writer=out, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


ANOTHER = another()


def test_the_end_of_a_document_may_be_named_by_the_models_config(folders, loaded, tmp_path: Path):
    settings = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    folder = others.write(tmp_path / "gpt2", settings, None)
    with pytest.raises(InputError, match="names no token that ends a document"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": [1, 0]}')
    found = load_tokenizer(folder)
    assert found.eos_id == 1
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for number, odd in enumerate(({}, {"eos_token": None}, {"eos_token": 3})):
        (folder / "tokenizer_config.json").write_text(json.dumps(odd))
        copy = write_tokenizer(load_tokenizer(folder).files(), tmp_path / f"copy{number}")
        assert copy.fingerprint == found.fingerprint == loaded["gpt2"].fingerprint
        assert (copy.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(folder).eos_id == 0
    assert load_tokenizer(folder).fingerprint != copy.fingerprint
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(InputError, match="eos_token_id = 99999 is no token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<nothing>"}}')
    with pytest.raises(InputError, match="eos_token = '<nothing>' is no token"):
        load_tokenizer(folder)
    for damaged in ("{", "[]"):
        (folder / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"tokenizer_config\.json is damaged"):
            load_tokenizer(folder)


def test_a_space_before_a_text_that_two_files_disagree_about_is_refused(folders, tmp_path: Path):
    folder = others.write(tmp_path, json.loads((folders["gpt2"] / "tokenizer.json").read_text()), others.EOS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for asked, kind, is_refused in (
        (True, "Qwen2Tokenizer", True),
        (False, "Qwen2Tokenizer", False),
        (True, "PreTrainedTokenizerFast", False),
    ):
        settings = config | {"add_prefix_space": asked, "tokenizer_class": kind}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match="add_prefix_space = True") if is_refused else nullcontext():
            load_tokenizer(folder)


def test_what_would_make_ids_random_or_shorter_is_left_out(folders, tmp_path: Path):
    settings = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    settings["model"]["dropout"] = 0.9
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|begin|>",
    }  # fmt: skip
    plain, odd = load_tokenizer(folders["gpt2"]), load_tokenizer(others.write(tmp_path, settings, others.EOS))
    np.testing.assert_array_equal(odd.encode(code()[0]), plain.encode(code()[0]))


def test_damaged_and_lossy_files_are_named(folders, tmp_path: Path):
    content = (folders["gpt2"] / "tokenizer.json").read_bytes()
    for damaged in (b"", b"{}", b"[]", b'"x"', b"\xff", content[:-500]):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(tmp_path)
    settings = json.loads(content)
    del settings["model"]["vocab"]["z"]
    settings["model"]["merges"] = []
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    empty = {**settings, "model": settings["model"] | {"vocab": {}}, "added_tokens": []}
    for lossy in (settings, settings | {"model": words, "decoder": None}, empty):
        others.write(tmp_path, lossy, others.EOS)
        with pytest.raises(InputError, match="neither byte-level nor has it byte fallback"):
            load_tokenizer(tmp_path)


def test_ids_that_would_fill_the_memory_are_refused(folders, tmp_path: Path):
    settings = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    settings["model"]["vocab"]["<far>"] = 2**23
    others.write(tmp_path, settings, others.EOS)
    with pytest.raises(InputError, match="has the id 8,388,608; at most 8,388,608 ids are read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}])
def test_a_normalizer_that_can_fill_the_memory_is_refused(folders, tmp_path: Path, pattern):
    settings = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": pattern, "content": "a" * 100}
    settings["normalizer"] = step
    load_tokenizer(others.write(tmp_path, settings, others.EOS))
    settings["normalizer"] = {"type": "Sequence", "normalizers": [step] * 6}
    others.write(tmp_path, settings, others.EOS)
    with pytest.raises(InputError, match="normalizer can make a text 1,000,000,000,000 times as long"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_a_line_that_names_the_file(folders, tmp_path: Path):
    settings = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    tokenizer = load_tokenizer(others.write(tmp_path, settings, others.EOS))
    with pytest.raises(InputError, match=rf"{tmp_path / 'tokenizer.json'} is damaged, or no tokenizer \(.*retry-limit"):
        tokenizer.encode("a" * 40 + "!")
