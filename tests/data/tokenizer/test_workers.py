"""Tokenizing in other processes: the same tokens in the same order, and no process is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from data.tokenizer.sentencepiece_tokenizer import MAX_PART_CHARACTERS, PART_CHARACTERS
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer
from data.tokenizer.workers import BATCH, Workers
from tests.data.texts import NASTY, code


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code()[:10], 1000, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_workers(tokenizer: Tokenizer):
    made: list[Workers] = []

    def make(number: int) -> Workers:
        made.append(Workers(tokenizer.folder, number))
        return made[-1]

    yield make
    for workers in made:
        workers.close()
        assert all(process.returncode is not None for process in workers._processes)


class Counted:
    """An iterator that knows how many were taken."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.taken = iter(texts), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.taken += 1
        return next(self.texts)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("batch", [100, BATCH])
def test_workers_give_the_same_tokens_in_order(tokenizer: Tokenizer, make_workers, monkeypatch, number, batch):
    monkeypatch.setattr("data.tokenizer.workers.BATCH", batch)
    texts = [*NASTY, *code()[:10], "".join(code()[:40]), *NASTY, *map(str, range(2000)), "=" * 100_000, ""]
    found = list(make_workers(number)(iter(texts)))
    assert len(found) == len(texts)
    for tokens, text in zip(found, texts, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def test_a_text_without_a_place_to_cut_is_cut_as_without_workers(tokenizer: Tokenizer, make_workers):
    text = "words, " * 5 * PART_CHARACTERS + "=" * (MAX_PART_CHARACTERS + 7) + " and more"
    assert max(map(len, tokenizer.parts(text))) == MAX_PART_CHARACTERS
    [found] = make_workers(2)([text])
    np.testing.assert_array_equal(found, tokenizer.encode(text))


def test_no_texts_give_nothing(make_workers):
    assert list(make_workers(1)([])) == []


@pytest.mark.parametrize("length", [0, 9, 1000, 3 * BATCH])
@pytest.mark.parametrize("number", [1, 3])
def test_texts_are_taken_a_little_ahead(make_workers, length: int, number: int):
    texts = Counted("ab " * (length // 3) for _ in count())
    found = make_workers(number)(texts)
    assert texts.taken == 0
    most = (2 + number) * -(-BATCH // (length + 1))
    for i in range(5):
        next(found)
        assert texts.taken <= i + 1 + most
    found.close()


def test_a_long_text_is_taken_apart_a_little_ahead(tokenizer: Tokenizer, make_workers):
    workers, sizes = make_workers(1), []
    encode = workers._encode

    def measured(parts):
        sizes.append(sum(len(part.text) for part in parts))
        return encode(parts)

    workers._encode = measured
    text = "some words " * 50_000
    [found] = workers([text])
    np.testing.assert_array_equal(found, tokenizer.encode(text))
    assert sum(sizes) == len(text)
    assert max(sizes) < BATCH + 2 * PART_CHARACTERS


@pytest.mark.parametrize("number", [1, 3])
def test_many_iterators_are_pulled_in_turn(tokenizer: Tokenizer, make_workers, number: int):
    workers = make_workers(number)
    texts = [[f"stream {v}, text {i} " * (500 * v + 1) for i in range(30 + v)] for v in range(6)]
    streams = [workers(own) for own in texts]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for _ in range(36):
        for own, stream in zip(found, streams, strict=True):
            own.extend(islice(stream, 1))
    for own, expected in zip(found, texts, strict=True):
        assert [tokenizer.decode(ids) for ids in own] == expected


def test_an_iterator_that_waits_holds_up_no_other(make_workers):
    workers = make_workers(1)
    waiting = [workers(f"number {i}\n" * 100 for i in count()) for _ in range(20)]
    for stream in waiting:
        next(stream)
    assert len(list(islice(workers("a line\n" * 1000 for _ in count()), 50))) == 50


def test_an_abandoned_iterator_leaves_no_work(make_workers):
    workers, begun, go_on = make_workers(1), [], threading.Event()
    encode = workers._encode

    def slowly(parts):
        begun.append(parts)
        if len(begun) > 1:
            go_on.wait(60)
        return encode(parts)

    workers._encode = slowly
    found = workers("a " * (BATCH // 2) for _ in count())  # each a batch, of which two more are under way
    next(found)
    found.close()
    go_on.set()
    assert len(list(workers(["a"]))) == 1
    # The first, at most the one that the process had in its hands, and our own.
    assert len(begun) <= 3
    assert workers._alive == 0


def test_a_process_that_dies_is_an_error(make_workers):
    workers = make_workers(1)
    found = workers(str(i) for i in count())
    next(found)
    [process] = workers._processes
    process.kill()
    for stream in (found, workers(["another"]), workers(["and another"])):
        with pytest.raises(RuntimeError, match="a tokenizing process ended with status -9"):
            for _ in stream:
                pass


def test_an_error_of_a_text_is_that_of_the_tokenizer(make_workers):
    workers = make_workers(1)
    with pytest.raises(ValueError):
        list(workers(["a \ud800 b"]))
    assert len(list(workers(["it goes on"]))) == 1


def test_a_folder_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        Workers(tmp_path, 1)


def test_ctrl_c_is_left_to_the_parent(tokenizer: Tokenizer):
    workers = Workers(tokenizer.folder, 1)
    list(workers(["it has begun"]))
    [process] = workers._processes
    process.send_signal(signal.SIGINT)
    [found] = workers(["it goes on"])
    workers.close()
    np.testing.assert_array_equal(found, tokenizer.encode("it goes on"))
    assert process.returncode == 0


def test_they_end_with_their_parent(tokenizer: Tokenizer, tmp_path: Path):
    program = (
        "import sys, time; from pathlib import Path; from data.tokenizer.workers import Workers\n"
        f"workers = Workers(Path({str(tokenizer.folder)!r}), 2)\n"
        "list(workers(['a', 'b', 'c', 'd']))\n"
        "print(*[process.pid for process in workers._processes], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/cmdline") and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
