"""Tokenizing in threads: the same tokens in the same order, ahead of the reader, and no thread is left."""

import threading
from collections.abc import Iterable, Iterator
from itertools import count, islice

import numpy as np
import pytest

from data.tokenizer.sentencepiece_tokenizer import MAX_PART_CHARACTERS, PART_CHARACTERS
from data.tokenizer.threads import BATCH_CHARACTERS, TokenizingThreads
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer
from tests.data.texts import NASTY, code


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code()[:10], 1000, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_threads(tokenizer: Tokenizer):
    before = set(threading.enumerate())
    made: list[TokenizingThreads] = []

    def make(number: int) -> TokenizingThreads:
        made.append(TokenizingThreads(tokenizer, number))
        return made[-1]

    yield make
    for threads in made:
        threads.close()
    assert set(threading.enumerate()) <= before


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
@pytest.mark.parametrize("batch", [100, BATCH_CHARACTERS])
def test_threads_give_the_same_tokens_in_order(tokenizer: Tokenizer, make_threads, monkeypatch, number, batch):
    monkeypatch.setattr("data.tokenizer.threads.BATCH_CHARACTERS", batch)
    texts = [*NASTY, *code()[:10], "".join(code()[:40]), *NASTY, *map(str, range(2000)), "=" * 100_000, ""]
    found = list(make_threads(number)(iter(texts)))
    assert len(found) == len(texts)
    for tokens, text in zip(found, texts, strict=True):
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def test_a_text_without_a_place_to_cut_is_cut_as_without_threads(tokenizer: Tokenizer, make_threads):
    text = "words, " * 5 * PART_CHARACTERS + "=" * (MAX_PART_CHARACTERS + 7) + " and more"
    assert max(map(len, tokenizer.parts(text))) == MAX_PART_CHARACTERS
    [found] = make_threads(2)([text])
    np.testing.assert_array_equal(found, tokenizer.encode(text))


def test_no_texts_give_nothing(make_threads):
    assert list(make_threads(1)([])) == []


@pytest.mark.parametrize("length", [0, 9, 1000, 3 * BATCH_CHARACTERS])
@pytest.mark.parametrize("number", [1, 3])
def test_texts_are_taken_a_little_ahead(make_threads, length: int, number: int):
    texts = Counted("ab " * (length // 3) for _ in count())
    found = make_threads(number)(texts)
    assert texts.taken == 0
    most = (2 + number) * -(-BATCH_CHARACTERS // (length + 1))
    for i in range(5):
        next(found)
        assert texts.taken <= i + 1 + most
    found.close()


def test_a_long_text_is_taken_apart_a_little_ahead(tokenizer: Tokenizer, make_threads):
    threads, sizes = make_threads(1), []
    encode = threads._encode

    def measured(parts, are_last):
        sizes.append(sum(map(len, parts)))
        return encode(parts, are_last)

    threads._encode = measured
    text = "some words " * 50_000
    [found] = threads([text])
    np.testing.assert_array_equal(found, tokenizer.encode(text))
    assert sum(sizes) == len(text)
    assert max(sizes) < BATCH_CHARACTERS + 2 * PART_CHARACTERS


@pytest.mark.parametrize("number", [1, 3])
def test_many_iterators_are_pulled_in_turn(tokenizer: Tokenizer, make_threads, number: int):
    threads = make_threads(number)
    texts = [[f"stream {v}, text {i} " * (500 * v + 1) for i in range(10 + v)] for v in range(6)]
    streams = [threads(own) for own in texts]
    found: list[list[np.ndarray]] = [[] for _ in texts]
    for _ in range(16):
        for own, stream in zip(found, streams, strict=True):
            own.extend(islice(stream, 1))
    for own, expected in zip(found, texts, strict=True):
        assert [tokenizer.decode(ids) for ids in own] == expected


def test_an_iterator_that_waits_holds_up_no_other(make_threads):
    threads = make_threads(1)
    waiting = [threads(f"number {i}\n" * 100 for i in count()) for _ in range(20)]
    for stream in waiting:
        next(stream)
    assert len(list(islice(threads("a line\n" * 1000 for _ in count()), 50))) == 50


def test_an_abandoned_iterator_leaves_no_work(make_threads):
    threads, begun, go_on = make_threads(1), [], threading.Event()
    encode = threads._encode

    def slowly(parts, are_last):
        begun.append(parts)
        if len(begun) > 1:
            go_on.wait(60)
        return encode(parts, are_last)

    threads._encode = slowly
    found = threads("a " * (BATCH_CHARACTERS // 2) for _ in count())  # each a batch, of which two more are under way
    next(found)
    found.close()
    go_on.set()
    assert len(list(threads(["a"]))) == 1
    # The first, at most the one that the thread had begun, and our own.
    assert len(begun) <= 3
    assert threads._num_iterators == 0


def test_an_error_of_a_text_is_that_of_the_tokenizer(make_threads):
    threads = make_threads(1)
    with pytest.raises(ValueError):
        list(threads(["a \ud800 b"]))
    assert len(list(threads(["it continues"]))) == 1


def test_other_threads_run_while_a_batch_is_encoded(tokenizer: Tokenizer):
    begun, ended = threading.Event(), threading.Event()

    def encode():
        begun.set()
        tokenizer.encode_parts(["some words " * 90] * 2000)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    assert begun.wait(60)
    # A loop that Python's global lock would hold up until the end runs many times.
    rounds = 0
    while not ended.is_set():
        rounds += 1
    thread.join()
    assert rounds > 1000
