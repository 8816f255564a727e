"""The order (C1), that an epoch loses nothing (C2), and positions."""

import dataclasses
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import corpus as corpus_module
from data.config import DataConfig
from data.corpus import Corpus, open_corpus
from data.errors import InputError
from data.infilling import Infilling
from data.segmenter import SegmentPart, make_segment
from data.stream import (
    BEGINNING,
    MAX_EMPTY_EPOCHS,
    Rows,
    Stream,
    StreamPosition,
    WindowReader,
    WindowStart,
    open_readers,
)
from tests.data.stand_in import ByteTokenizer, tokenize

CONFIG = DataConfig(segment_length=16, num_streams=3, chunk_bytes=400, shuffle_window=900, validation_fraction=0.1)
SHAPES = [
    {},
    {"segmentation": "pack"},
    {"train_last_position": False},
    {"segmentation": "pack", "shuffle_rows": True},
    {"segmentation": "pack", "train_last_position": False, "shuffle_window": 2000},
    {"document_mask": False, "shuffle_window": 1},
]


def write(folder: Path, texts: list[str], ending: str = ".jsonl") -> str:
    """The texts as one .jsonl, perhaps compressed, or each as a .txt."""
    if ending == ".txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
        return str(folder)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / f"a{ending}").write_bytes(gzip.compress(lines) if ending.endswith(".gz") else lines)
    return str(folder / f"a{ending}")


def some_texts() -> list[str]:
    random = np.random.default_rng(0)
    return [f"{i}:" + "x" * int(random.integers(1, 80)) for i in range(150)]


@pytest.fixture(scope="module", params=[".jsonl", ".jsonl.gz"])
def corpus(request, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One whose streams have chunks of their own, and one that they share."""
    corpus = open_corpus(write(tmp_path_factory.mktemp("corpus"), some_texts(), request.param), CONFIG)
    assert corpus.shared == (request.param == ".jsonl.gz")
    return corpus


def stream(
    corpus: Corpus,
    v: int,
    position: StreamPosition = BEGINNING,
    seed: int = 0,
    config: DataConfig = CONFIG,
    infilling: Infilling | None = None,
) -> Rows:
    reader = open_readers(corpus, config, seed, {v: position})[v]
    return Stream(reader, tokenize, ByteTokenizer.bos_ids, ByteTokenizer.eos_id, config, v, infilling).rows(position)


def assert_restores(rows_from: Callable[[StreamPosition], Rows], rows: int, config: DataConfig) -> None:
    """Some rows from the position after this number of them are those that follow without a restart."""
    straight = rows_from(BEGINNING)
    position = [BEGINNING, *(after for _, after in itertools.islice(straight, rows))][-1]
    again = rows_from(position)
    for (expected, after), (found, after_found) in itertools.islice(zip(straight, again, strict=True), 30):
        assert after == after_found
        for name, array in make_segment(expected, config).items():
            np.testing.assert_array_equal(make_segment(found, config)[name], array)


def epoch_of(corpus: Corpus, config: DataConfig, v: int, epoch: int) -> list[list[SegmentPart]]:
    """The rows of one epoch of a stream."""
    bounded = dataclasses.replace(config, epochs=epoch + 1)
    return [parts for parts, _ in stream(corpus, v, StreamPosition(epoch), config=bounded)]


def pairs_in(rows: list[list[SegmentPart]], config: DataConfig) -> Counter:
    """How often each (file, place, pair) of a document is trained on."""
    found: Counter = Counter()
    for parts in rows:
        weights, filled = make_segment(parts, config)["loss_weights"], 0
        for part in parts:
            document = part.pairs.document
            for pair, weight in enumerate(weights[filled : filled + part.end - part.begin], part.begin):
                found[document.file, document.place, pair] += int(weight)
            filled += part.end - part.begin
    return found


def wanted(corpus: Corpus) -> Counter:
    """Once every pair of every training document."""
    return Counter(
        (document.file, document.place, pair)
        for chunk in corpus.chunks
        for document in corpus.documents(chunk)
        for pair in range(len(document.text.encode()) + document.ends)
    )


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@hypothesis.settings(max_examples=8)
@given(
    texts=st.lists(st.text("abc é\n", min_size=1, max_size=100), min_size=30, max_size=60),
    streams=st.integers(1, 4),
    T=st.integers(3, 40),
    chunk_bytes=st.integers(256, 1000),
    shuffle_window=st.sampled_from([1, 700, 10**6]),
)
def test_an_epoch_of_all_streams_trains_once_on_every_token(
    tmp_path_factory, texts, streams, T, chunk_bytes, shuffle_window, ending, shape
):
    config = dataclasses.replace(
        CONFIG,
        **{"num_streams": streams, "segment_length": T, "chunk_bytes": chunk_bytes, "shuffle_window": shuffle_window}
        | shape,
    )
    texts = [f"{i} {text}" for i, text in enumerate(texts)] * 4
    corpus = open_corpus(write(tmp_path_factory.mktemp("corpus"), texts, ending), config)
    held_out = [document.text for document in corpus.held_out()]
    kept = Counter(document.text for chunk in corpus.chunks for document in corpus.documents(chunk))
    assert kept + Counter(held_out) == Counter(texts)
    for epoch in (0, 3):
        rows = [parts for v in range(streams) for parts in epoch_of(corpus, config, v, epoch)]
        assert pairs_in(rows, config) == wanted(corpus)


def test_pieces_of_long_files_are_all_trained_on(tmp_path: Path):
    texts = ["".join(f"{i} {j}\n" for j in range(600)) for i in range(2)]
    config = dataclasses.replace(CONFIG, num_streams=2)
    corpus = open_corpus(write(tmp_path, texts, ".txt"), config)
    held_out = "".join(document.text for document in corpus.held_out())
    rows = [parts for v in range(2) for parts in epoch_of(corpus, config, v, 0)]
    assert pairs_in(rows, config) == wanted(corpus)
    found = "".join({part.pairs.document: part.pairs.document.text for parts in rows for part in parts}.values())
    assert Counter(found.splitlines()) + Counter(held_out.splitlines()) == Counter("".join(texts).splitlines())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@hypothesis.settings(max_examples=20)
@given(rows=st.integers(0, 400), v=st.integers(0, 2))
def test_a_position_restores_the_rest_of_the_stream(corpus, rows, v, shape):
    config = dataclasses.replace(CONFIG, **shape)
    assert_restores(lambda position: stream(corpus, v, position, config=config), rows, config)


def test_a_stream_of_some_epochs_ends_and_stays_at_its_end(corpus):
    config = dataclasses.replace(CONFIG, epochs=2)
    *_, (_, position) = stream(corpus, 1, config=config)
    assert position.epoch == 1
    assert list(stream(corpus, 1, position, config=config)) == []


def test_restoring_reads_a_single_window(tmp_path: Path, monkeypatch):
    corpus = open_corpus(write(tmp_path, some_texts()), CONFIG)
    config = dataclasses.replace(CONFIG, shuffle_window=1)
    *_, (_, position) = itertools.islice(stream(corpus, 0, config=config), 700)
    assert position.epoch > 2
    assert (position.chunk, position.place) > (0, 0)
    read = []
    original = Corpus._all
    monkeypatch.setattr(
        Corpus, "_all", lambda self, *where, **how: (read.append(d) or d for d in original(self, *where, **how))
    )
    next(stream(corpus, 0, position, config=config))
    assert 1 <= len(read) <= 4


def test_streams_that_share_a_file_read_it_once_and_tokenize_only_their_own(tmp_path: Path, monkeypatch):
    corpus = open_corpus(write(tmp_path, some_texts() * 20, ".jsonl.gz"), CONFIG)
    read = []
    original = Corpus.documents
    monkeypatch.setattr(Corpus, "documents", lambda self, *where: read.append(where) or original(self, *where))
    tokenized = Counter()

    def counting(texts):
        for text in texts:
            tokenized["characters"] += len(text)
            yield ByteTokenizer().encode(text)

    config = dataclasses.replace(CONFIG, epochs=1)
    readers = open_readers(corpus, config, 0, {0: BEGINNING, 2: BEGINNING})
    streams = [Stream(readers[v], counting, [0], 0, config, v).rows() for v in (0, 2)]
    for _ in itertools.zip_longest(*streams):
        pass
    assert len(read) == 1
    whole = sum(len(document.text) for document in corpus.documents(corpus.chunks[0]))
    assert 0.6 < tokenized["characters"] / whole < 0.72
    assert not readers[0]._waiting


def test_a_long_compressed_file_comes_in_windows_of_bounded_size(tmp_path: Path):
    corpus = open_corpus(write(tmp_path, some_texts() * 20, ".jsonl.gz"), CONFIG)
    reader, start = open_readers(corpus, CONFIG, 0, {0: BEGINNING})[0], WindowStart()
    sizes = []
    while start.epoch == 0:
        window = reader.take(0, start)
        sizes.append(sum(len(document.text) for document in window.documents))
        start = window.next
    assert len(sizes) > 50
    assert max(sizes) <= CONFIG.shuffle_window / 3 + 200


def test_epochs_and_seeds_order_differently_and_repeatably(corpus):
    def first_rows(seed: int, epoch: int) -> list[list[int]]:
        rows = itertools.islice(stream(corpus, 1, StreamPosition(epoch), seed), 12)
        return [make_segment(parts, CONFIG)["tokens"].tolist() for parts, _ in rows]

    assert first_rows(0, 0) == first_rows(0, 0)
    orders = [first_rows(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_the_order_is_pinned(tmp_path: Path, ending: str):
    """The order belongs to saved runs: a change of it breaks their resumption."""
    texts = [f"document {i:02}" for i in range(60)]
    corpus = open_corpus(write(tmp_path, texts * 5, ending), dataclasses.replace(CONFIG, num_streams=2))
    config = dataclasses.replace(CONFIG, num_streams=2)
    rows = [parts for v in range(2) for parts, _ in itertools.islice(stream(corpus, v, config=config), 2)]
    tokens = [make_segment(parts, CONFIG)["tokens"].tolist() for parts in rows]
    assert [bytes(t - 1 if 0 < t < 257 else 0 for t in row).decode() for row in tokens] == PINNED[ending]


def test_shuffled_rows_are_those_of_a_window_in_an_order_of_their_own(tmp_path: Path):
    """Rows of a document that is longer than one are neighbours without it. The order is pinned, as above."""
    texts = ["".join(f"{letter}{i}-{n:03} " for n in range(60)) for i in range(6) for letter in "abc"]
    plain = dataclasses.replace(CONFIG, segmentation="pack", num_streams=2, shuffle_window=1000)
    corpus = open_corpus(write(tmp_path, texts), plain)
    shuffled = dataclasses.replace(plain, shuffle_rows=True)

    def windows_of(config: DataConfig, epoch: int = 0) -> dict[WindowStart, list[bytes]]:
        windows: dict[WindowStart, list[bytes]] = {}
        bounded = dataclasses.replace(config, epochs=epoch + 1)
        for parts, position in stream(corpus, 0, StreamPosition(epoch), config=bounded):
            windows.setdefault(position.start, []).append(make_segment(parts, config)["tokens"].tobytes())
        return windows

    before, after = windows_of(plain), windows_of(shuffled)
    assert {start: sorted(rows) for start, rows in before.items()} == {start: sorted(after[start]) for start in after}
    assert len(before) > 1
    assert all(before[start] != after[start] for start in before)
    orders = [[rows.index(row) for row in after[start]] for start, rows in before.items()]
    shortest = min(map(len, orders))
    assert shortest > 20
    assert len({tuple(place for place in order if place < shortest) for order in orders}) > 1
    beginning = [bytes(t - 1 for t in np.frombuffer(row, np.int32) if 0 < t < 257).decode() for row in after[(0, 0, 0)]]
    assert beginning[:3] == PINNED_ROWS


PINNED_ROWS = ["-011 c3-012 c3-0", "13 b1-014 b1-015", "b1-009 b1-010 b1"]

PINNED = {
    ".jsonl": ["\x00document 10\x00doc", "ument 42\x00documen", "\x00document 47\x00doc", "ument 03\x00documen"],
    ".jsonl.gz": ["\x00document 13\x00doc", "ument 09\x00documen", "\x00document 01\x00doc", "ument 47\x00documen"],
}


def test_a_stream_without_documents_goes_on_to_an_epoch_that_has_some(tmp_path: Path):
    corpus = open_corpus(write(tmp_path, ["y" * 4000]), dataclasses.replace(CONFIG, chunk_bytes=500))
    begins = [[position.epoch for _, position in itertools.islice(stream(corpus, v), 600)] for v in range(3)]
    assert sorted(epochs[0] == 0 for epochs in begins) == [False, False, True]
    assert all(epochs[-1] > epochs[0] for epochs in begins)


def test_streams_that_never_have_documents_are_an_error(tmp_path: Path, monkeypatch):
    corpus = open_corpus(write(tmp_path, [""] * 100), CONFIG)
    taken = []
    original = WindowReader.take
    monkeypatch.setattr(
        WindowReader, "take", lambda self, v, start: taken.append(start.epoch) or original(self, v, start)
    )
    with pytest.raises(InputError, match=r"lower data\.num_streams"):
        next(stream(corpus, 0))
    assert taken == list(range(MAX_EMPTY_EPOCHS + 1))


def test_the_chunks_of_an_epoch_are_sorted_once_for_all_streams(tmp_path: Path, monkeypatch):
    corpus = open_corpus(write(tmp_path, some_texts()), CONFIG)
    hashed = []
    original = corpus_module.stable_hash
    monkeypatch.setattr(corpus_module, "stable_hash", lambda *parts: hashed.append(parts) or original(*parts))
    orders = [corpus.order(7, 5) for _ in range(3)]
    assert sorted(orders[0], key=corpus.chunks.index) == corpus.chunks
    assert len(hashed) == len(corpus.chunks)


def test_streams_that_share_chunks_get_the_same_amount_of_text(tmp_path: Path):
    texts = [f"{i} " + "x" * (2000 if i % 50 == 0 else 20) for i in range(400)]
    config = dataclasses.replace(CONFIG, shuffle_window=10**6, validation_fraction=0.0)
    corpus = open_corpus(write(tmp_path, texts, ".jsonl.gz"), config)
    sizes = [sum(pairs_in(epoch_of(corpus, config, v, 0), config).values()) for v in range(config.num_streams)]
    # The next document goes to the stream with the least text, so no two differ by more than the longest.
    assert max(sizes) - min(sizes) <= max(map(len, texts))


def test_each_document_has_a_row_of_its_own_and_none_is_cut(corpus: Corpus):
    config = dataclasses.replace(CONFIG, segmentation="document", segment_length=96)
    rows = [parts for v in range(config.num_streams) for parts in epoch_of(corpus, config, v, 0)]
    assert all(len(parts) == 1 and parts[0].begin == 0 for parts in rows)
    assert pairs_in(rows, config) == wanted(corpus)
    assert_restores(lambda position: stream(corpus, 1, position, config=config), 7, config)
    short = dataclasses.replace(config, segment_length=40)
    with pytest.raises(InputError, match=r"the document takes \d+ positions, and is never cut; give data.segment_len"):
        epoch_of(corpus, short, 0, 0)
