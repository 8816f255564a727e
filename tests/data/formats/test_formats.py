"""Each format: chunks tile a file, any document is found again, and damage is reported with its place."""

import codecs
import gzip
import itertools
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.corpus import open_corpus
from data.errors import BadText, InputError
from data.files.listing import File, fingerprint, list_files, open_file
from data.files.ranges import READ_TOTALS
from data.formats import (
    ENDINGS,
    Fields,
    RawDocument,
    ReadResult,
    format_and_compression,
    jsonl,
    line_number,
    parquet,
    read_documents,
    text,
    written_place,
)
from data.formats import content as content_module
from tests.peers import require

TEXTS = st.lists(st.text(alphabet='aé漢🙂 \n\r\t"\\-=', max_size=40), max_size=20)
CUTS = st.lists(st.floats(0, 1), max_size=6)
ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
PLAIN = Fields()
SEPARATED = Fields(separator="---")


def compress(ending: str) -> Callable[[bytes], bytes]:
    if ending == ".zst":
        zstd = require(ZSTD)
        return lambda content: zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]


def written(folder: Path, name: str, content: bytes) -> File:
    (folder / name).write_bytes(content)
    [file] = list_files(str(folder / name), ENDINGS)
    return file


def lines(texts: list[str], end: str = "\n", **more: Any) -> bytes:
    return "".join(json.dumps({"text": t, **more}, ensure_ascii=False) + end for t in texts).encode()


def table(folder: Path, columns: dict[str, Any], name: str = "a.parquet", **options: Any) -> File:
    arrow, writer = require("pyarrow"), require("pyarrow.parquet")
    writer.write_table(arrow.table(columns), folder / name, **options)
    [file] = list_files(str(folder / name), ENDINGS)
    return file


def plain(found: list[ReadResult]) -> list[tuple[int, RawDocument | str]]:
    """Comparable: problems as their texts."""
    return [(place, str(content) if isinstance(content, BadText) else content) for place, content in found]


def everything(file: File, fields: Fields = PLAIN, place: int = 0) -> list[tuple[int, RawDocument | str]]:
    return plain(list(read_documents(file, 0, file.size, fields, place)))


def texts_of(file: File, fields: Fields = PLAIN) -> list[str]:
    return [
        content.text for _, content in read_documents(file, 0, file.size, fields) if isinstance(content, RawDocument)
    ]


def in_chunks(file: File, cuts: list[float], fields: Fields) -> list[tuple[int, RawDocument | str]]:
    places = sorted({0, file.size, *(round(cut * file.size) for cut in cuts)})
    return [
        found
        for begin, end in itertools.pairwise(places)
        for found in plain(list(read_documents(file, begin, end, fields)))
    ]


def check_tiles_and_resumes(file: File, cuts: list[float], fields: Fields) -> None:
    """The chunks are the file, and from each document on a chunk is the rest of it."""
    whole = everything(file, fields)
    assert in_chunks(file, cuts, fields) == whole
    begin = round(cuts[0] * file.size) if cuts else 0
    chunk = plain(list(read_documents(file, begin, file.size, fields)))
    for i, (place, _) in enumerate(chunk):
        assert plain(list(read_documents(file, begin, file.size, fields, place))) == chunk[i:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("formats")


@given(texts=TEXTS, cuts=CUTS, end=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]), final=st.booleans())
def test_the_lines_of_all_chunks_are_the_file(folder, texts, cuts, end, final):
    content = lines(texts, end)
    file = written(folder, "a.jsonl", content if final else content.rstrip(b"\r\n \t"))
    assert texts_of(file) == texts
    check_tiles_and_resumes(file, cuts, Fields())


@given(content=st.binary(max_size=300) | st.text(alphabet='{}"[]:text\n\r ', max_size=300).map(str.encode), cuts=CUTS)
def test_whatever_stands_in_a_jsonl_is_reported_once(folder, content, cuts):
    check_tiles_and_resumes(written(folder, "any.jsonl", content), cuts, Fields())


@given(
    texts=TEXTS,
    cuts=CUTS,
    end=st.sampled_from(["\n", "\r\n"]),
    around=st.tuples(st.sampled_from(["", "---\n"]), st.sampled_from(["", "\n", "\n---", "\n---\n"])),
)
def test_the_documents_between_separators_of_all_chunks_are_the_file(folder, texts, cuts, end, around):
    texts = [text for text in texts if "---" not in text.splitlines()]
    content = around[0] + f"{end}---{end}".join(texts) + (around[1] if texts else "")
    file = written(folder, "a.txt", content.encode())
    wanted = [text for text in texts if text]
    found = texts_of(file, SEPARATED)
    # A line end at the end of a file, or a carriage return before the separator's line end, belongs to no document.
    assert [text.rstrip("\r\n") for text in found if text.rstrip("\r\n")] == [
        text.rstrip("\r\n") for text in wanted if text.rstrip("\r\n")
    ]
    check_tiles_and_resumes(file, cuts, SEPARATED)


@given(content=st.text(alphabet="-\n\ra", max_size=200).map(str.encode) | st.binary(max_size=60), cuts=CUTS)
def test_chunks_of_anything_with_separators_are_the_file(folder, content, cuts):
    check_tiles_and_resumes(written(folder, "any.txt", content), cuts, SEPARATED)


def test_a_separator_stands_alone_on_its_line(tmp_path: Path):
    file = written(tmp_path, "a.txt", b"one\n---\n\n---\r\n ---\ntwo---\n----\r\n---\n---\nthree\r\n\r\n---")
    assert everything(file, SEPARATED) == [
        (0, RawDocument("one")),
        (14, RawDocument(" ---\ntwo---\n----")),
        (40, RawDocument("three\r\n")),
    ]


@given(texts=TEXTS, cuts=CUTS, group=st.integers(1, 25))
def test_the_rows_of_all_chunks_are_the_file(folder, texts, cuts, group):
    file = table(
        folder, {"n": list(range(len(texts))), "text": [*texts]} if texts else {"text": ["x"]}, row_group_size=group
    )
    assert texts_of(file) == (texts or ["x"])
    assert len(parquet.read_footer(file).begins) == -(-max(len(texts), 1) // group)
    check_tiles_and_resumes(file, cuts, Fields())


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
@given(texts=TEXTS, parts=st.integers(1, 3))
def test_compressed_text_is_the_text(folder, ending, texts, parts):
    squeeze = compress(ending)
    for name, content, fields in (
        ("c.jsonl", lines(texts), Fields()),
        ("c.txt", "\n---\n".join(texts).encode(), SEPARATED),
    ):
        step = len(content) // parts + 1
        squeezed = b"".join(squeeze(content[i : i + step]) for i in range(0, max(len(content), 1), step))
        file, same = written(folder, name + ending, squeezed), written(folder, name, content)
        assert everything(file, fields) == everything(same, fields)
        for place, _ in everything(same, fields):
            assert everything(file, fields, place) == everything(same, fields, place)
    whole = written(folder, "w.txt" + ending, squeeze("\n".join(texts).encode()))
    assert everything(whole) == ([(0, RawDocument("\n".join(texts)))] if "\n".join(texts) else [])


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
def test_a_compressed_file_that_ends_too_early_gives_what_it_has_and_says_so(tmp_path: Path, ending: str):
    chance = random.Random(1)
    texts = ["".join(chance.choices("abcdefgh ", k=200)) for _ in range(3000)]
    content = compress(ending)(lines(texts))
    for size in (1, 2, 5, 11, 30, len(content) // 2, len(content) - 9, len(content) - 1):
        file = written(tmp_path, f"{size}.jsonl{ending}", content[:size])
        found = []
        with pytest.raises(BadText, match="ends too early, after byte" if size > 1 else "byte 0 of its text"):
            for _, document in read_documents(file, 0, file.size, Fields()):
                found.append(document.text)
        assert found == texts[: len(found)]
    assert len(found) == len(texts)
    assert list(read_documents(written(tmp_path, f"0.jsonl{ending}", b""), 0, 0, Fields())) == []


@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz"])
def test_a_flipped_bit_of_a_compressed_file_never_changes_a_text_in_silence(tmp_path: Path, ending: str):
    texts = [f"document {i} " * 5 for i in range(60)]
    content = compress(ending)(lines(texts[:30])) + compress(ending)(lines(texts[30:]))
    chance, damaged = random.Random(2), 0
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << chance.randrange(8)
        file = written(tmp_path, "a.jsonl" + ending, bytes(flipped))
        try:
            # Some bits, such as a .gz's time, mean nothing.
            assert texts_of(file) == texts
        except BadText:
            damaged += 1
    assert damaged > len(content) * 0.9
    trailing = written(tmp_path, "b.jsonl" + ending, content + b"trailing")
    with pytest.raises(BadText, match="(damaged|ends too early,) after byte 43"):
        texts_of(trailing)
    assert texts_of(written(tmp_path, "c.jsonl" + ending, content + bytes(512))) == texts


def test_a_file_that_was_made_with_long_distances_is_read(tmp_path: Path):
    zstd = require(ZSTD)
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.enable_long_distance_matching: 1}
    file = written(tmp_path, "a.jsonl.zst", zstd.compress(lines(["long"] * 9), options=options))
    assert texts_of(file) == ["long"] * 9


def test_bad_lines_are_reported_with_their_place_and_reading_goes_on(tmp_path: Path):
    bad = {
        b"{not json}": "is no JSON: Expecting property name enclosed in double quotes at character 1",
        b"[1]": "is no object but list",
        b'{"body": "", "n": 1}': "has no field 'text', only body, n; see data.text_field",
        b'{"text": 1, "p": ""}': "field 'text' is no text but int",
        b'{"text": null, "p": ""}': "field 'text' is no text but NoneType",
        b'{"text": "\xff", "p": ""}': "byte 10 of the line is no UTF-8",
        b'{"text": "a\\ud800", "p": ""}': "half a character at 1",
        b"[" * 200_000: "cannot be read: maximum recursion",
        b'{"text": ' + b"1" * 10_000 + b"}": "cannot be read",
        b'{"text": "a"}': "has no field 'p', only text; see data.prompt_field",
        b'{"text": "a", "p": []}': "field 'p' is no text but list",
        b'\xef\xbb\xbf{"text": "a", "p": ""}': "is no JSON",
    }
    good = b'{"text": "good", "p": "asked"}\n'
    file = written(tmp_path, "a.jsonl", good + b"".join(line + b"\n" + good for line in bad))
    found = everything(file, Fields(prompt="p"))
    assert [content for _, content in found[::2]] == [RawDocument("good", "asked")] * (len(bad) + 1)
    content = Path(file.path).read_bytes()
    for number, ((place, problem), line, words) in enumerate(zip(found[1::2], bad, bad.values(), strict=True)):
        assert content[place:].startswith(line)
        assert words in str(problem)
        assert line_number(file, place) == 2 * number + 2
        assert written_place(file, place) == f":{2 * number + 2}"


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    assert everything(written(tmp_path, "a.jsonl", mark + lines(["a", "b"])))[0] == (0, RawDocument("a"))
    assert everything(written(tmp_path, "a.txt", mark + b"a\n---\nb"), SEPARATED) == [
        (0, RawDocument("a")),
        (9, RawDocument("b")),
    ]
    assert everything(written(tmp_path, "b.txt", mark + b"a\xff"), SEPARATED)[0][1].startswith("byte 4 is no UTF-8")
    assert everything(written(tmp_path, "b.jsonl", mark)) == []


MARKED = st.lists(st.text(alphabet="aé\n\ufeff", max_size=9), min_size=1, max_size=5)


@given(texts=MARKED, kind=st.sampled_from([ending for ending in ENDINGS if ending != ".parquet"]))
def test_a_byte_order_mark_before_a_file_changes_no_document(tmp_path_factory, texts, kind):
    format_, compression = format_and_compression("a" + kind)
    for first in ("a", "---\na"):
        whole = lines(texts) if format_ == ".jsonl" else (first + "\n---\n".join(texts)).encode()
        for separator in ("---", None):
            config = DataConfig(num_streams=1, validation_fraction=0, chunk_bytes=256, text_separator=separator)
            found = []
            for mark in (b"", codecs.BOM_UTF8):
                path = tmp_path_factory.mktemp("marked") / f"a{kind}"
                path.write_bytes(compress(compression)(mark + whole))
                corpus = open_corpus(str(path), config)
                found.append([d.text for chunk in corpus.chunks for d in corpus.documents(chunk)])
            assert found[0] == found[1]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".txt.xz", ".parquet"])
def test_a_document_has_a_longest_length_and_reading_goes_on_after_it(tmp_path: Path, monkeypatch, ending: str):
    for module in (content_module, jsonl, parquet, text):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(content_module, "SKIPPED_BYTES", 64)
    texts = ["short", "long " * 1000, "short, too"]
    if ending == ".parquet":
        file = table(tmp_path, {"text": texts}, row_group_size=1)
        first, second, third = parquet.read_footer(file).begins
        for begin, expected in ((first, texts[0]), (third, texts[2])):
            [(_, document)] = read_documents(file, begin, begin + 1, PLAIN)
            assert document == RawDocument(expected)
        with pytest.raises(BadText, match="is longer than"):
            list(read_documents(file, second, third, PLAIN))
        return
    format_, compression = format_and_compression("a" + ending)
    whole = lines(texts) if format_ == ".jsonl" else "\n---\n".join(texts).encode()
    file = written(tmp_path, f"a{ending}", compress(compression)(whole))
    (_, one), (_, problem), (_, other) = everything(file, SEPARATED)
    assert (one, other) == (RawDocument(texts[0]), RawDocument(texts[2]))
    assert "is longer than" in problem


def test_a_very_long_line_is_read_in_time(tmp_path: Path):
    content = lines(["x" * 50_000_000, "after"])
    file = written(tmp_path, "a.jsonl", content)
    assert [len(text) for text in texts_of(file)] == [50_000_000, 5]
    half = len(content) // 2
    [(_, after)] = list(read_documents(file, half, file.size, Fields()))
    assert after == RawDocument("after")
    assert texts_of(written(tmp_path, "a.jsonl.gz", gzip.compress(content, 1)))[1] == "after"
    for fields, long in ((PLAIN, file), (SEPARATED, written(tmp_path, "a.txt", content))):
        READ_TOTALS.clear()
        assert list(read_documents(long, half, half + 2**16, fields)) == []
        assert READ_TOTALS["bytes"] < 2**18


def test_no_more_is_read_than_is_wanted(tmp_path: Path):
    file = written(tmp_path, "a.jsonl", lines(["x" * 1000] * 20_000))
    place = everything(file)[15_000][0]
    READ_TOTALS.clear()
    assert next(read_documents(file, file.size // 2, file.size, Fields(), place))[0] == place
    assert READ_TOTALS["bytes"] < 20_000
    columns = {"text": [f"{i}" + "x" * 1000 for i in range(20_000)], "other": [f"{i}y" * 500 for i in range(20_000)]}
    file = table(tmp_path, columns, row_group_size=1000, compression="none", use_dictionary=False)
    READ_TOTALS.clear()
    assert next(read_documents(file, 0, file.size, Fields(), 15_500))[1].text.startswith("15500x")
    assert READ_TOTALS["bytes"] < 1_500_000 < file.size / 20


@pytest.mark.parametrize("type_", ["string", "large_string", "dictionary", "string_view"])
def test_texts_of_every_kind_of_column_are_read_and_a_null_is_reported(tmp_path: Path, type_: str):
    arrow = require("pyarrow")
    column = arrow.array(["a", None, "", "漢🙂"])
    column = column.dictionary_encode() if type_ == "dictionary" else column.cast(getattr(arrow, type_)())
    file = table(tmp_path, {"text": column, "p": ["1", "2", None, "4"]})
    found = everything(file, Fields(prompt="p"))
    problems = ["column 'text' is null", "column 'p' is null"]
    assert found == [(0, RawDocument("a", "1")), (1, problems[0]), (2, problems[1]), (3, RawDocument("漢🙂", "4"))]
    assert everything(file)[2] == (2, RawDocument(""))
    assert written_place(file, 1) == ", row 1 (from 0)"


def test_bytes_of_a_column_that_are_no_text_are_reported_by_row(tmp_path: Path):
    arrow = require("pyarrow")
    raw = arrow.array([b"a", b"\xffb", b"c"], arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), 3, raw.buffers())
    found = everything(table(tmp_path, {"text": column}))
    assert [place for place, _ in found] == [0, 1, 2]
    assert "column 'text' is no UTF-8 at byte 0" in str(found[1][1])
    assert found[2][1] == RawDocument("c")


def test_what_is_wrong_with_a_parquet_is_said(tmp_path: Path):
    arrow = require("pyarrow")

    def problem(file: File, fields: Fields = PLAIN) -> str:
        with pytest.raises(BadText) as caught:
            everything(file, fields)
        return str(caught.value)

    file = table(tmp_path, {"body": ["a"], "n": [1]})
    assert problem(file) == "has no column 'text', only body, n; see data.text_field"
    assert "column 'n' holds no text but int64; see data.text_field" in problem(file, Fields("n"))
    assert "see data.prompt_field" in problem(file, Fields("body", "q"))
    assert "binary" in problem(table(tmp_path, {"text": arrow.array([b"a"])}, "b.parquet"))
    content = Path(table(tmp_path, {"text": [f"{i} some text" for i in range(9999)]}, "c.parquet").path).read_bytes()
    for size in (1, 3, 11, len(content) // 2, len(content) - 1):
        assert "is no parquet" in problem(written(tmp_path, "d.parquet", content[:size]))
    assert problem(written(tmp_path, "e.parquet", content[:100] + bytes(2000) + content[2100:])).startswith(
        "is damaged"
    )


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", ZSTD):
        monkeypatch.setitem(sys.modules, name, None)
    for name, remedy in (("a.parquet", r"pip install -e '.\[parquet\]'"), ("a.txt.zst", "pip install backports.zstd")):
        with pytest.raises(InputError, match=remedy):
            everything(written(tmp_path, name, b"some bytes"))


def test_pieces_of_a_text_are_cut_behind_lines_and_between_characters(tmp_path: Path, monkeypatch):
    file = written(tmp_path, "a.txt", "a line\n漢字漢字漢字\n".encode())
    assert [text.piece_start(file, at, file.size) for at in (-1, 0, 1, 7, 8, 26, 99)] == [0, 0, 7, 7, 26, 26, 26]
    monkeypatch.setattr(text, "LINE_BYTES", 3)
    assert text.piece_start(file, 8, file.size) == 10
    assert text.read_text(file, 7, 13) == "漢字"
    with pytest.raises(BadText, match="byte 13 is no UTF-8"):
        text.read_text(file, 7, 15)
    with pytest.raises(BadText, match="byte 8 is no UTF-8"):
        text.read_text(file, 8, 13)


def test_names_have_a_format_and_a_compression():
    assert len(ENDINGS) == 12
    assert [format_and_compression(name) for name in ("a.txt", "b.c.jsonl.gz", "d/e.parquet", "f.gz.txt")] == [
        (".txt", ""),
        (".jsonl", ".gz"),
        (".parquet", ""),
        (".txt", ""),
    ]


def test_local_files_are_listed_as_folder_glob_and_file(tmp_path: Path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "deep/a.txt.gz", "deep/er/c.parquet", ".hidden/d.txt", ".e.txt", "note.md"):
        (tmp_path / name).write_bytes(b"12")
    names = ["b.jsonl", "deep/a.txt.gz", "deep/er/c.parquet"]
    files = list_files(str(tmp_path), ENDINGS)
    assert [(file.name, file.size) for file in files] == [(name, 2) for name in names]
    assert [file.name for file in list_files(f"{tmp_path}/deep/**/*.parquet", ENDINGS)] == ["er/c.parquet"]
    assert [file.name for file in list_files(f"file://{tmp_path}/b.jsonl", ENDINGS)] == ["b.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [file.name for file in list_files("~/deep", ENDINGS)] == ["a.txt.gz", "er/c.parquet"]
    assert [file.name for file in list_files(str(tmp_path), ENDINGS, tmp_path / "deep")] == ["b.jsonl"]
    assert len(list_files(str(tmp_path / "deep"), ENDINGS, tmp_path / "deep")) == 2
    (tmp_path / "empty").mkdir()
    for where, problem in (
        ("empty", "the folder holds no .txt, .jsonl, .parquet, .*.json.xz file"),
        ("*.parquet", "matches no file"),
        ("none", "there is no such file or folder"),
        ("note.md", "note.md is no .txt, .jsonl, .*; convert or rename it"),
    ):
        with pytest.raises(InputError, match=problem):
            list_files(str(tmp_path / where), ENDINGS)


def test_a_local_file_that_changed_since_it_was_listed_is_not_read(tmp_path: Path):
    file = written(tmp_path, "a.jsonl", lines(["a", "b"]))
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "bc"]))
    with pytest.raises(BadText, match="has changed since the run listed it"):
        everything(file)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(BadText, match="has vanished"):
        everything(file)
    assert written_place(file, 17) == ", byte 17"


def test_a_fingerprint_follows_name_size_and_content(tmp_path: Path):
    middle = bytearray(b"x" * 300_000)
    file = written(tmp_path, "a.txt", bytes(middle))
    (tmp_path / "b").mkdir()
    assert fingerprint(written(tmp_path / "b", "a.txt", bytes(middle)), True) == fingerprint(file, True)
    middle[150_000] = 0
    other = written(tmp_path / "b", "a.txt", bytes(middle))
    assert fingerprint(other, True) != fingerprint(written(tmp_path, "a.txt", b"x" * 300_000), True)
    assert fingerprint(other, False) == fingerprint(written(tmp_path, "a.txt", b"x" * 300_000), False)
    assert len(fingerprint(other, False)) == 64
    with open_file(other, 150_000) as stream:
        assert stream.read(2) == b"\0x"


@pytest.mark.parametrize(("whole", "places"), [(True, (0, 2**20, 3 * 2**20 - 1)), (False, (0, 3 * 2**20 - 1))])
def test_a_fingerprint_sees_what_it_reads_of_a_file_of_several_blocks(tmp_path: Path, whole: bool, places):
    content = bytes(3 * 2**20)
    fingerprints = {fingerprint(written(tmp_path, "a.txt", content), whole)}
    for place in places:
        changed = content[:place] + b"x" + content[place + 1 :]
        fingerprints.add(fingerprint(written(tmp_path, "a.txt", changed), whole))
    assert len(fingerprints) == 1 + len(places)
