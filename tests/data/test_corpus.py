"""Listing, chunks, held-out parts, fingerprints, and what is wrong with a corpus."""

import dataclasses
import errno
import gzip
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import corpus as corpus_module
from data.config import DataConfig
from data.corpus import MANY_FILES, Corpus, open_corpus
from data.errors import Fault, InputError
from data.files import listing
from data.files.ranges import READ_TOTALS
from data.formats import text as text_format
from data.formats.stdlib import snapshot_stdlib
from tests.peers import require

CONFIG = DataConfig(num_streams=2, chunk_bytes=1000, validation_fraction=0.05)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


def training(corpus: Corpus) -> list[str]:
    return [document.text for chunk in corpus.chunks for document in corpus.documents(chunk)]


def held_out_of(corpus: Corpus) -> list[str]:
    return [d.text for d in sorted(corpus.held_out(), key=lambda d: (d.file, d.place))]


def names_of(where: object, leave_out: Path | None = None) -> list[str]:
    return [file.name for file in open_corpus(str(where), CONFIG, leave_out).files]


def error(where: object, config: DataConfig = CONFIG) -> str:
    with pytest.raises(InputError) as caught:
        open_corpus(str(where), config).check()
    return str(caught.value)


@given(
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=8, max_size=60),
    chunk_bytes=st.integers(256, 2000),
    streams=st.integers(1, 4),
)
def test_every_line_is_in_one_chunk_and_trained_on_or_held_out(tmp_path_factory, texts, chunk_bytes, streams):
    texts = [f"{i} {text}" for i, text in enumerate(texts)] * 20
    path = write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts)
    corpus = open_corpus(str(path), dataclasses.replace(CONFIG, chunk_bytes=chunk_bytes, num_streams=streams))
    assert Counter(training(corpus)) + Counter(held_out_of(corpus)) == Counter(texts)
    assert set(training(corpus)).isdisjoint(held_out_of(corpus))


def test_a_document_with_a_prompt_is_either_trained_on_or_held_out(tmp_path: Path):
    config = dataclasses.replace(CONFIG, prompt_field="prompt", validation_fraction=0.5)
    path = tmp_path / "a.jsonl"
    pairs = [(f"question {i % 20}", f"answer {i // 20}") for i in range(200)]
    path.write_text("".join(json.dumps({"prompt": prompt, "text": text}) + "\n" for prompt, text in pairs))
    corpus = open_corpus(str(path), config)
    trained = [(document.prompt, document.text) for chunk in corpus.chunks for document in corpus.documents(chunk)]
    held_out = [(document.prompt, document.text) for document in corpus.held_out()]
    assert sorted(trained + held_out) == sorted(pairs)
    assert 50 < len(held_out) < 150


@given(
    text=st.text(alphabet="aé漢🙂 \n\r", min_size=500, max_size=4000),
    chunk_bytes=st.integers(256, 3000),
    fraction=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_the_pieces_of_one_txt_are_its_bytes_in_order(tmp_path_factory, text, chunk_bytes, fraction):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_bytes(text.encode())
    config = DataConfig(num_streams=1, chunk_bytes=chunk_bytes, validation_fraction=fraction)
    corpus = open_corpus(str(path), config)
    documents = [document for chunk in corpus.chunks for document in corpus.documents(chunk)]
    assert "".join(d.text for d in documents) + "".join(held_out_of(corpus)) == text
    assert [d.ends for d in documents[:-1]] == [False] * (len(documents) - 1)
    held_out = "".join(held_out_of(corpus))
    assert documents[-1].ends == (held_out == "")


def test_one_big_txt_feeds_all_streams_and_holds_out_its_end(tmp_path: Path):
    lines = [f"line {i} of a book\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = open_corpus(str(tmp_path / "book.txt"), dataclasses.replace(CONFIG, num_streams=16, chunk_bytes=2**20))
    assert len(corpus.chunks) >= 4 * 16 - 4
    held_out = held_out_of(corpus)
    assert "".join(training(corpus)) + held_out[0] == "".join(lines)
    assert 0.045 < len(held_out[0]) / len("".join(lines)) < 0.055
    assert all(piece.endswith("\n") for piece in training(corpus))


def test_a_very_long_line_is_cut_between_characters(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(text_format, "LINE_BYTES", 16)
    path = tmp_path / "a.txt"
    path.write_text("漢字" * 500)
    corpus = open_corpus(str(path), CONFIG)
    assert len(training(corpus)) > 2
    assert "".join(training(corpus)) + "".join(held_out_of(corpus)) == "漢字" * 500


def test_of_many_txt_files_whole_ones_are_held_out(tmp_path: Path):
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"document {i}\nits end")
    corpus = open_corpus(str(tmp_path), CONFIG)
    held_out = held_out_of(corpus)
    assert 5 <= len(held_out) <= 30
    assert sorted(training(corpus) + held_out) == sorted(f"document {i}\nits end" for i in range(300))


@pytest.mark.parametrize("last_line", ["漢字🙂" * 100 + "\n", "漢字🙂" * 100, "x" * 999 + "\n"])
def test_the_end_of_a_txt_is_held_out_of_a_long_last_line_too(tmp_path: Path, last_line: str):
    content = "a line\n" * 20 + last_line
    (tmp_path / "a.txt").write_text(content)
    corpus = open_corpus(str(tmp_path), CONFIG)
    [held_out] = held_out_of(corpus)
    assert 0.04 < len(held_out.encode()) / len(content.encode()) < 0.06
    assert "".join(training(corpus)) + held_out == content


def test_one_of_many_txt_files_is_held_out_where_chance_holds_out_none(tmp_path: Path):
    for i in range(MANY_FILES):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    (tmp_path / "empty.txt").touch()
    for fraction, number in ((1e-9, 1), (0.0, 0)):
        corpus = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, validation_fraction=fraction))
        assert len(held_out_of(corpus)) == number
        assert len(training(corpus)) == MANY_FILES - number


def test_a_long_held_out_txt_comes_in_pieces(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus_module, "HELD_OUT_PIECE_BYTES", 100)
    content = "".join(f"line {i} of a book\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(content)
    corpus = open_corpus(str(tmp_path), CONFIG)
    pieces = held_out_of(corpus)
    assert len(pieces) > 5
    assert max(map(len, pieces)) < 130
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(training(corpus) + pieces) == content


@pytest.mark.parametrize(("kind", "number"), [(".jsonl", 1), (".jsonl", 30), (".jsonl.gz", 30), (".txt", 300)])
def test_the_first_held_out_documents_are_a_sample_of_the_corpus(tmp_path: Path, kind: str, number: int):
    for n in range(number):
        each = range(n * 12_000 // number, (n + 1) * 12_000 // number)
        if kind == ".txt":
            (tmp_path / f"{n:03}{kind}").write_text("".join(f"{i} {'text ' * 20}\n" for i in each))
            continue
        content = "".join(json.dumps({"text": f"{i} {'text ' * 20}"}) + "\n" for i in each).encode()
        (tmp_path / f"{n:03}{kind}").write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    corpus = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, chunk_bytes=2**14))
    READ_TOTALS.clear()
    first = [int(d.text.split()[0]) for d in itertools.islice(corpus.held_out(), 100 if kind != ".txt" else 10)]
    assert READ_TOTALS["bytes"] < 0.6 * corpus.size
    assert 3600 < sum(first) / len(first) < 8400
    assert max(first) - min(first) > 7000
    again = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, chunk_bytes=2**14))
    assert first == [int(d.text.split()[0]) for d in itertools.islice(again.held_out(), len(first))]


def test_a_corpus_in_the_order_of_its_file_is_said(tmp_path: Path):
    texts = [f"{i} some text" for i in range(2000)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for config, problem in ((dataclasses.replace(CONFIG, shuffle_window=1000), True), (CONFIG, False)):
        said = open_corpus(str(tmp_path / "a.jsonl.gz"), config).order_problem()
        assert (f"store it uncompressed or in {config.num_streams} files or more" in said) is bool(said) is problem
        assert not open_corpus(str(tmp_path / "a.jsonl"), config).order_problem()


@pytest.mark.parametrize("separator", ["----", "--- ", "--"])
@pytest.mark.parametrize("small", [2**28, 0])
def test_a_separator_that_is_in_no_line_is_said(tmp_path: Path, caplog, monkeypatch, separator: str, small: int):
    """Of a corpus of any size, from a bounded part of it."""
    monkeypatch.setattr(corpus_module, "SMALL_CORPUS_BYTES", small)
    text = "\n---\n".join(f"text {i}" for i in range(100)).encode()
    (tmp_path / "a.txt").write_bytes(b"one document")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    config = dataclasses.replace(CONFIG, text_separator="---", num_streams=1, validation_fraction=0)
    open_corpus(str(tmp_path), config).check()
    assert not caplog.messages
    for name in "cdefghij":
        (tmp_path / f"{name}.txt").write_bytes(text + bytes(2**23))
    READ_TOTALS.clear()
    open_corpus(str(tmp_path), dataclasses.replace(config, text_separator=separator)).check()
    assert small or READ_TOTALS["bytes"] < 9 * 2**22
    assert f"data.text_separator = {separator!r} separates nothing in the first 4 MiB of 10 files" in caplog.text


@given(text=st.text())
def test_what_is_held_out_follows_from_the_text_alone(text):
    assert corpus_module.unit_hash(text) == corpus_module.stable_hash("held out", text) / 2**64


def test_folders_globs_and_files_are_listed_in_the_same_order(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "b.jsonl", ["b" * 900] * 9)
    write_jsonl(tmp_path / "deep" / "er" / "a.jsonl", ["a" * 900] * 9)
    (tmp_path / "note.md").write_text("not listed")
    folder = open_corpus(str(tmp_path), CONFIG)
    assert [file.name for file in folder.files] == ["deep/b.jsonl", "deep/er/a.jsonl"]
    assert names_of(f"{tmp_path}/**/*.jsonl") == names_of(tmp_path)
    assert open_corpus(f"{tmp_path}/**/*.jsonl", CONFIG).fingerprint == folder.fingerprint
    assert names_of(f"{tmp_path}/deep/b.jsonl") == ["b.jsonl"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", ["some text " * 50] * 9)
    for where in ("~", "~/a.jsonl", "~/*.jsonl"):
        assert names_of(where) == ["a.jsonl"]


def test_what_a_run_writes_below_its_corpus_is_no_corpus(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/one")
    (run / "corpus").mkdir(parents=True)
    for name in ("a.jsonl", "runs/one_more.jsonl", "runs/one/held_out.jsonl", "runs/one/corpus/stdlib.jsonl"):
        write_jsonl(Path(name), [name * 100] * 9)
    (tmp_path / "link").symlink_to(run)
    for where in (".", str(tmp_path), "**/*.jsonl"):
        for leave_out in (run, run.absolute(), Path("link")):
            assert names_of(where, leave_out) == ["a.jsonl", "runs/one_more.jsonl"]
    for where in (run, run / "corpus", run / "corpus" / "stdlib.jsonl", run / "corpus" / "*.jsonl"):
        assert "stdlib.jsonl" in "".join(names_of(where, run))
    for nothing in ("runs/*/held_out.jsonl", "n" * 300 + "/*", "a\0b*"):
        with pytest.raises(InputError, match="matches no file"):
            open_corpus(nothing, CONFIG, run)


def test_the_fingerprint_follows_content_and_names_not_the_place(tmp_path: Path):
    first = tmp_path / "first"
    first.mkdir()
    write_jsonl(first / "a.jsonl", ["some text " * 50] * 9)
    fingerprint = open_corpus(str(first), CONFIG).fingerprint
    shutil.move(first, tmp_path / "moved")
    assert open_corpus(str(tmp_path / "moved"), CONFIG).fingerprint == fingerprint
    write_jsonl(tmp_path / "moved" / "a.jsonl", ["some text " * 50] * 8 + ["same text " * 50])
    assert open_corpus(str(tmp_path / "moved"), CONFIG).fingerprint != fingerprint


def test_a_touched_file_is_still_read_and_a_changed_one_asks_for_a_new_start(tmp_path: Path):
    for name in ("a.jsonl", "b.txt"):
        path = write_jsonl(tmp_path / name, ["some text " * 50] * 9)
        content = path.read_bytes()
        corpus = open_corpus(str(path), CONFIG, field="data.corpus['web']")
        known = open_corpus(str(path), CONFIG)
        assert known.fingerprint
        documents = training(corpus)
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)
        os.utime(path, (1, 1))
        assert training(known) == documents
        assert known.fingerprint == open_corpus(str(path), CONFIG).fingerprint
        path.write_bytes(content.replace(b"some", b"same"))
        with pytest.raises(Fault, match=f"{name}.*: has changed since the run listed it; put it back"):
            training(known)
        path.unlink()
        with pytest.raises(Fault, match=r"data.corpus\['web'\]: a file has vanished"):
            assert corpus.fingerprint


@pytest.mark.parametrize(
    ("size", "lines", "others"),
    [
        (2**24, 2**16, 2**20),  # a window of 4 MiB is of 64 places of a small corpus
        (2**31, 2**17, 2**20),
        (2**35, 2**20, 2**20),
        (2**19, 2**16, 2**16),  # two streams have four chunks each
    ],
)
def test_chunks_are_small_where_they_hold_whole_documents(size: int, lines: int, others: int):
    def largest(name: str, **fields: Any) -> int:
        files = [listing.File(f"f/{name}-{i}", f"{i}-{name}", size // 32, "1") for i in range(32)]
        config = DataConfig(num_streams=2, validation_fraction=0.0, **fields)
        # Chunks follow from the listing: there is no such file.
        return max(chunk.end - chunk.begin for chunk in Corpus(files, config).chunks)

    of_files = lambda step: min(step, size // 32)
    assert largest("a.jsonl") == largest("a.txt", text_separator="---") == of_files(lines)
    assert largest("a.txt") == largest("a.parquet") == of_files(others)
    assert largest("a.jsonl.gz") == size // 32
    given = 2**15
    assert largest("a.jsonl", chunk_bytes=given) == largest("a.txt", chunk_bytes=given) == of_files(given)


def test_a_chunk_is_read_without_reading_its_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 100] * 50_000)
    corpus = open_corpus(str(path), dataclasses.replace(CONFIG, chunk_bytes=4096))
    with open("/proc/self/io") as before:
        began = int(before.read().split()[1])
    list(corpus.documents(corpus.chunks[len(corpus.chunks) // 2]))
    with open("/proc/self/io") as after:
        assert int(after.read().split()[1]) - began < 100_000


def test_what_is_left_out_is_said_once_and_damage_behind_it_too(tmp_path: Path, caplog):
    lines = [b'{"text": "line %d"}' % i for i in range(100)] + [b"not json"]
    content = gzip.compress(b"\n".join(lines) + b"\n" + b"x" * 10_000)
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) - 12])
    config = dataclasses.replace(CONFIG, num_streams=1, validation_fraction=0.0, on_bad_document="skip")
    corpus = open_corpus(str(tmp_path), config)
    for _ in range(2):
        assert len(training(corpus)) == 100
    assert (0, sum(len(line) + 1 for line in lines[:-1])) in corpus.skipped
    assert len(corpus.skipped) == 2
    assert len(caplog.messages) == 2
    assert "a.jsonl.gz:101: " in caplog.messages[0]
    assert "ends too early" in caplog.messages[1]


def test_many_bad_lines_are_not_counted_to_again_and_again(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" * 2000 + b'{"text": "good"}\n')
    corpus = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, num_streams=1, on_bad_document="skip"))
    READ_TOTALS.clear()
    training(corpus)
    assert len(corpus.skipped) == 2000
    # Once for the documents, and for the first few messages to the line that they name.
    assert READ_TOTALS["bytes"] < 20 * corpus.size


def test_nothing_is_read_to_hold_nothing_out(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", ["some text"] * 100)
    corpus = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, validation_fraction=0.0))
    READ_TOTALS.clear()
    assert held_out_of(corpus) == []
    assert READ_TOTALS["bytes"] == 0


def test_few_parquet_files_have_their_row_groups_as_chunks(tmp_path: Path):
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    texts = [f"{i} " * 50 for i in range(90)]
    for name, part in (("a", texts[:60]), ("b", texts[60:])):
        parquet.write_table(pyarrow.table({"text": part}), tmp_path / f"{name}.parquet", row_group_size=20)
    corpus = open_corpus(str(tmp_path), dataclasses.replace(CONFIG, num_streams=5, validation_fraction=0.0))
    assert not corpus.shared
    assert [sum(1 for _ in corpus.documents(chunk)) for chunk in corpus.chunks] == [20, 20, 20, 20, 10]
    assert open_corpus(str(tmp_path), dataclasses.replace(CONFIG, num_streams=6)).shared


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), dictionary=st.booleans())
def test_every_row_is_read_once_whatever_row_groups_are_empty(tmp_path_factory, sizes, dictionary):
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    path = tmp_path_factory.mktemp("corpus") / "a.parquet"
    texts = [str(i) for i in range(sum(sizes))]
    whole = pyarrow.table({"text": texts, "good": [True] * len(texts)})
    with parquet.ParquetWriter(path, whole.schema, use_dictionary=dictionary) as writer:
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            writer.write_table(whole.slice(end - size, size))
    for streams in (1, 8):
        config = dataclasses.replace(CONFIG, num_streams=streams, validation_fraction=0.0)
        assert training(open_corpus(str(path), config)) == texts


def test_a_damaged_parquet_is_said(tmp_path: Path, monkeypatch):
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["some text"] * 60}), path, row_group_size=20)
    whole = path.read_bytes()
    name = whole.rindex(b"\x04text")
    path.write_bytes(whole[: name + 1] + b"\xff" + whole[name + 2 :])
    assert "is damaged: " in error(path)

    path.write_bytes(whole)
    corpus = open_corpus(str(path), CONFIG)

    def readinto(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    # A disk that fails is no damage of the file.
    monkeypatch.setattr(listing._LocalFile, "readinto", readinto)
    with pytest.raises(OSError, match="Input/output error"):
        training(corpus)


def test_the_default_corpus_is_the_standard_library_without_tests(tmp_path: Path):
    path = tmp_path / "corpus" / "stdlib.jsonl"
    snapshot_stdlib(path)
    names = [json.loads(line)["path"] for line in path.open()]
    assert 550 < len(names) < 800
    assert {"argparse.py", "asyncio/tasks.py"} <= set(names)
    assert not [
        name
        for name in names
        if name.startswith("test/") or "/tests/" in name or "encodings/" in name or "site-packages" in name
    ]
    assert 8e6 < path.stat().st_size < 15e6
    held_out = held_out_of(open_corpus(str(path), dataclasses.replace(CONFIG, num_streams=16)))
    assert 0.02 < len(held_out) / len(names) < 0.08


def test_what_is_wrong_with_a_corpus_is_named_with_its_place(tmp_path: Path):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    good = b'{"text": "' + b"a" * 2000 + b'"}\n'
    assert "there is no such file or folder" in error(tmp_path / "none")
    assert "matches no file" in error(tmp_path / "*.jsonl")
    assert "a.csv is no .txt, .jsonl, " in error(file("a.csv", b"1"))
    (tmp_path / "folder").mkdir()
    assert "the folder holds no .txt, .jsonl, " in error(tmp_path / "folder")
    assert error("n" * 5000) == f"data.corpus = {'n' * 5000}: there is no such file or folder"
    assert "matches no file" in error("n" * 5000 + "/*")
    assert "there is no text in it" in error(file("empty.txt", b""))
    assert "lower data.num_streams" in error(file("short.txt", b"a few words"))
    assert "b.txt: byte 3000 is no UTF-8" in error(file("b.txt", b"a" * 3000 + b"\xff" + b"a" * 10))
    file("a2.jsonl", good * 2)
    assert "a.jsonl:3: " in error(file("a.jsonl", good * 2 + b"{not json}\n" + good))
    assert "has no field 'text', only body, n; see data.text_field" in error(
        write_jsonl(tmp_path / "c.jsonl", ["a" * 3000], field="body")
    )
    assert "is no object but list" in error(file("d.jsonl", good + b"[1]\n"))
    assert "field 'text' is no text but int" in error(file("e.jsonl", good + b'{"text": 1}\n'))
    assert "f.jsonl:2: " in error(file("f.jsonl", good + b'{"text": "\\ud800"}\n'))
    assert "g.jsonl:2: " in error(file("g.jsonl", good + b"[" * 200_000 + b"\n"))
    assert "no document to train on" in error(write_jsonl(tmp_path / "h.jsonl", [""] * 100))
    held_out = dataclasses.replace(CONFIG, validation_fraction=0.999999)
    assert "no document to train on" in error(tmp_path / "a2.jsonl", held_out)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "folder")
    shutil.copy(tmp_path / "b.txt", tmp_path / "folder")
    assert len(error(tmp_path / "folder").splitlines()) == 2
    for where, config in (("h.jsonl", CONFIG), ("a2.jsonl", held_out), ("short.txt", CONFIG)):
        with pytest.raises(InputError, match=r"^data.corpus\['web'\] has "):
            open_corpus(str(tmp_path / where), config, field="data.corpus['web']").check()
    # A command without that field does not advise it.
    assert "data.on_bad_document=skip" in error(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="mend it$"):
        list(open_corpus(str(tmp_path / "a.jsonl"), CONFIG, field="--corpus").all_documents())
