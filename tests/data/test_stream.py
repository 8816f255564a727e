"""The order (C1), that an epoch loses nothing (C2), and positions."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import corpus as corpus_module
from data.config import DataConfig
from data.corpus import Corpus, open_corpus
from data.errors import InputError
from data.stream import EMPTY_EPOCHS, Stream
from tests.data.stand_in import tokenize

CONFIG = DataConfig(segment_length=16, num_streams=3, chunk_bytes=400, shuffle_bytes=900, validation_fraction=0.1)


def write(folder: Path, texts: list[str], split: bool = False) -> str:
    """The texts as one .jsonl, or each as a .txt."""
    if split:
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
        return str(folder)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "a.jsonl")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    random = np.random.default_rng(0)
    texts = [f"{i}:" + "x" * int(random.integers(1, 80)) for i in range(150)]
    return open_corpus(write(tmp_path_factory.mktemp("corpus"), texts), CONFIG)


def stream(corpus: Corpus, v: int, position=(0, 0, 0, 0), seed: int = 0, config: DataConfig = CONFIG) -> Stream:
    return Stream(corpus, tokenize, 0, config, seed, v, config.num_streams or 1, position)


def epoch_targets(corpus: Corpus, config: DataConfig, v: int, epoch: int) -> list[str]:
    """The documents that a stream trains on in one epoch, read back from its rows' targets."""
    targets: list[int] = []
    expected = sum(
        len(document.text.encode()) + document.ends
        for window in stream(corpus, v, config=config).windows(epoch)
        for document in stream(corpus, v, config=config).documents(epoch, window)
    )
    for row, _ in stream(corpus, v, position=(epoch, 0, 0, 0), config=config):
        assert (row["loss_weights"] == 1).all()
        targets += row["targets"].tolist()
        if len(targets) >= expected:
            break
    return bytes(t - 1 if t else 0 for t in targets[:expected]).decode().split("\0")


@given(
    texts=st.lists(st.text("abc é\n", min_size=1, max_size=100), min_size=30, max_size=60),
    streams=st.integers(1, 4),
    T=st.integers(3, 40),
    chunk_bytes=st.integers(256, 1000),
    shuffle_bytes=st.sampled_from([1, 700, 10**6]),
)
def test_an_epoch_of_all_streams_trains_once_on_every_token(
    tmp_path_factory, texts, streams, T, chunk_bytes, shuffle_bytes
):
    config = dataclasses.replace(
        CONFIG, num_streams=streams, segment_length=T, chunk_bytes=chunk_bytes, shuffle_bytes=shuffle_bytes
    )
    texts = [f"{i} {text}" for i, text in enumerate(texts)] * 4
    corpus = open_corpus(write(tmp_path_factory.mktemp("corpus"), texts), config)
    held_out = set(corpus.held_out_texts())
    for epoch in (0, 3):
        found = [text for v in range(streams) for text in epoch_targets(corpus, config, v, epoch)]
        assert Counter(filter(None, found)) == Counter(text for text in texts if text not in held_out)


def test_pieces_of_long_files_are_all_trained_on(tmp_path: Path):
    texts = ["".join(f"{i} {j}\n" for j in range(600)) for i in range(2)]
    config = dataclasses.replace(CONFIG, num_streams=2)
    corpus = open_corpus(write(tmp_path, texts, split=True), config)
    held_out = "".join(corpus.held_out_texts())
    found = "".join("".join(epoch_targets(corpus, config, v, 0)) for v in range(2))
    assert Counter(found.splitlines()) + Counter(held_out.splitlines()) == Counter("".join(texts).splitlines())


@given(rows=st.integers(0, 400), v=st.integers(0, 2))
def test_a_position_restores_the_rest_of_the_stream(corpus, rows, v):
    straight = stream(corpus, v)
    position = [(0, 0, 0, 0), *(after for _, after in itertools.islice(straight, rows))][-1]
    again = stream(corpus, v, position)
    for (expected, after), (found, after_found) in itertools.islice(zip(straight, again, strict=True), 30):
        assert after == after_found
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_restoring_reads_a_single_window(corpus, monkeypatch):
    config = dataclasses.replace(CONFIG, shuffle_bytes=1)
    *_, (_, position) = itertools.islice(stream(corpus, 0, config=config), 700)
    assert position[0] > 2
    assert position[1] > 0
    read = []
    original = Corpus.documents
    monkeypatch.setattr(Corpus, "documents", lambda self, chunk: read.append(chunk) or original(self, chunk))
    next(stream(corpus, 0, position, config=config))
    assert len(read) <= 2


def test_epochs_and_seeds_order_differently_and_repeatably(corpus):
    def first_rows(seed: int, epoch: int) -> list[list[int]]:
        rows = itertools.islice(stream(corpus, 1, (epoch, 0, 0, 0), seed), 12)
        return [row["tokens"].tolist() for row, _ in rows]

    assert first_rows(0, 0) == first_rows(0, 0)
    orders = [first_rows(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_the_order_is_pinned(tmp_path: Path):
    """The order belongs to saved runs: a change of it breaks their resumption."""
    texts = [f"document {i:02}" for i in range(60)]
    corpus = open_corpus(write(tmp_path, texts), dataclasses.replace(CONFIG, num_streams=2))
    rows = [row["tokens"] for v in range(2) for row, _ in itertools.islice(stream(corpus, v), 2)]
    text = [bytes(t - 1 if t else 0 for t in row.tolist()).decode() for row in rows]
    assert text == PINNED


PINNED = ["\x00document 13\x00doc", "ument 47\x00documen", "\x00document 01\x00doc", "ument 09\x00documen"]


def test_a_stream_without_documents_goes_on_to_an_epoch_that_has_some(tmp_path: Path):
    corpus = open_corpus(write(tmp_path, ["y" * 4000]), dataclasses.replace(CONFIG, chunk_bytes=500))
    begins = [[position[0] for _, position in itertools.islice(stream(corpus, v), 600)] for v in range(3)]
    assert sorted(epochs[0] == 0 for epochs in begins) == [False, False, True]
    assert all(epochs[-1] > epochs[0] for epochs in begins)


def test_streams_that_never_have_documents_are_an_error(tmp_path: Path, monkeypatch):
    corpus = open_corpus(write(tmp_path, [""] * 100), CONFIG)
    epochs = []
    monkeypatch.setattr(Stream, "windows", lambda self, epoch: epochs.append(epoch) or [corpus.chunks])
    with pytest.raises(InputError, match=r"lower data\.num_streams"):
        next(stream(corpus, 0))
    assert epochs == list(range(EMPTY_EPOCHS))


def test_the_chunks_of_an_epoch_are_sorted_once_for_all_streams(corpus, monkeypatch):
    hashed = []
    original = corpus_module.digest
    monkeypatch.setattr(corpus_module, "digest", lambda *parts: hashed.append(parts) or original(*parts))
    dealt = [chunk for v in range(3) for window in stream(corpus, v, seed=7).windows(5) for chunk in window]
    assert sorted(dealt, key=corpus.chunks.index) == corpus.chunks
    assert len(hashed) == len(corpus.chunks)
