"""Several corpora: how often each is drawn, that each keeps its order, and how they end."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.errors import InputError
from data.mixture import (
    CREDITS_PER_ROW,
    POSITION_SIZE,
    MixedStream,
    Mixture,
    choose_corpus,
    initial_positions,
    open_mixture,
    open_streams,
)
from data.stream import BEGINNING, Stream, open_readers
from tests.data.stand_in import ByteTokenizer, tokenize

CONFIG = DataConfig(segment_length=16, num_streams=4, chunk_bytes=400, shuffle_window=900, validation_fraction=0.1)


def nowhere() -> str:
    raise AssertionError("the default corpus was not asked for")


def write(path: Path, word: str, number: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{word}{i} " * 5}) + "\n" for i in range(number)))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, number in (("a", 300), ("b", 120), ("c", 60)):
        write(folder / f"{name}.jsonl", name, number)
    return folder


def mixture_of(folder: Path, config: DataConfig = CONFIG, **weights: object) -> Mixture:
    corpora = {
        name: {"corpus": str(folder / f"{name}.jsonl")} | (own if isinstance(own, dict) else {"weight": own})
        for name, own in weights.items()
    }
    return open_mixture(dataclasses.replace(config, corpus=corpora), nowhere)


def streams_of(mixture: Mixture, positions: np.ndarray | None = None) -> dict[int, MixedStream]:
    begin = initial_positions(mixture, 4) if positions is None else positions
    return open_streams(mixture, ByteTokenizer(), tokenize, 0, range(4), begin)


@given(weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), rows=st.integers(1, 3000))
def test_a_corpus_is_drawn_as_often_as_its_share_says_at_any_time(weights, rows):
    shares = [weight * CREDITS_PER_ROW // sum(weights) for weight in weights]
    shares[0] += CREDITS_PER_ROW - sum(shares)
    credits, drawn = [0] * len(weights), Counter()
    for n in range(1, rows + 1):
        drawn[choose_corpus(credits, shares)] += 1
        # In whole numbers: |drawn − n · share| < K − 1, or < 1 for two.
        bound = CREDITS_PER_ROW * max(len(weights) - 1, 1)
        assert all(abs(drawn[k] * CREDITS_PER_ROW - n * share) < bound for k, share in enumerate(shares))
    assert credits == [rows * share - drawn[k] * CREDITS_PER_ROW for k, share in enumerate(shares)]


def test_streams_come_to_a_rare_corpus_at_different_times(folder: Path):
    mixture = mixture_of(folder, a=99, c=1)
    streams = streams_of(mixture)
    rare = [[step for step in range(400) if stream.take(step)[0] == 1] for stream in streams.values()]
    assert [len(steps) for steps in rare] == [4] * 4
    firsts = sorted(steps[0] for steps in rare)
    assert all(other - one >= 20 for one, other in itertools.pairwise(firsts))
    # Over all streams as well a corpus is drawn as its share says, to a few rows.
    drawn = Counter(step for steps in rare for step in steps)
    assert all(abs(sum(drawn[s] for s in range(n)) - n * 4 / 100) <= 2 for n in range(1, 400))


def test_each_corpus_comes_in_the_order_that_it_has_alone(folder: Path):
    mixture = mixture_of(folder, a=2, b=1)
    stream = streams_of(mixture)[2]
    taken = [stream.take(step) for step in range(60)]
    for k, source in enumerate(mixture.sources):
        reader = open_readers(source.corpus, source.config, 0, {2: BEGINNING})[2]
        alone = Stream(reader, tokenize, [257], 0, source.config, 2).rows()
        for parts in (parts for corpus, parts in taken if corpus == k):
            assert texts(parts) == texts(next(alone)[0])


def test_positions_restore_the_rest(folder: Path):
    mixture = mixture_of(folder, a=3, b=2, c=[[0, 0], [20, 5]])
    streams = streams_of(mixture)
    for step in range(33):
        for stream in streams.values():
            stream.take(step)
    positions = np.stack([stream.positions for stream in streams.values()])
    assert positions.shape == (4, 3, POSITION_SIZE)
    assert positions.dtype == np.int64
    again = streams_of(mixture, positions)
    for step in range(33, 60):
        for v in range(4):
            (k, parts), (other, other_parts) = streams[v].take(step), again[v].take(step)
            assert (k, texts(parts)) == (other, texts(other_parts))
    np.testing.assert_array_equal(
        *(np.stack([stream.positions for stream in some.values()]) for some in (streams, again))
    )


def test_weights_follow_a_schedule_by_step(folder: Path):
    mixture = mixture_of(folder, a=[[0, 1], [100, 0]], b=[[0, 0], [50, 1]])
    stream = streams_of(mixture)[0]
    drawn = [stream.take(step)[0] for step in range(150)]
    assert set(drawn[:50]) == {0}
    assert Counter(drawn[50:100]) == {0: 25, 1: 25}
    assert set(drawn[100:]) == {1}


def test_a_corpus_ends_or_repeats_as_its_own_field_says(folder: Path):
    mixture = mixture_of(folder, a={"weight": 1}, c={"weight": 1, "epochs": 2})
    assert mixture.is_bounded
    streams = streams_of(mixture)
    read: Counter[str] = Counter()
    for step in range(1000):
        for stream in streams.values():
            k, parts = stream.take(step)
            if k == 1:
                read.update(text for part in parts if part.begin == 0 for text in [part.pairs.document.text])
    assert all(stream.ended == [False, True] for stream in streams.values())
    [*_, source] = mixture.sources
    assert read == Counter(dict.fromkeys(source.corpus.training_texts(0), 2))


def test_a_corpus_ends_at_the_same_step_after_a_resume(folder: Path):
    mixture = mixture_of(folder, CONFIG, a={"weight": 9}, c={"weight": 1, "epochs": 1})

    def end(streams: dict[int, MixedStream], step: int) -> int:
        while not all(stream.ended[1] for stream in streams.values()):
            for stream in streams.values():
                stream.take(step)
            step += 1
        return step

    expected = end(streams_of(mixture), 0)
    for stop in (expected - 1, expected - 3, expected - 8):
        streams = streams_of(mixture)
        for step in range(stop):
            for stream in streams.values():
                stream.take(step)
        assert any(stream.ended[1] for stream in streams.values())
        positions = np.stack([stream.positions for stream in streams.values()])
        assert end(streams_of(mixture, positions), stop) == expected


def test_the_order_of_the_names_means_nothing(folder: Path):
    one, other = mixture_of(folder, a=1, b=2), mixture_of(folder, b=2, a=1)
    assert [source.name for source in one.sources] == [source.name for source in other.sources]
    assert list(one.fingerprints()) == list(other.fingerprints())


def test_some_corpus_has_a_weight_at_any_step():
    schedules = {"a": [[0, 1], [100, 0]], "b": [[0, 0], [200, 1]]}
    corpora = {name: {"corpus": "x", "weight": weight} for name, weight in schedules.items()}
    [problem] = dataclasses.replace(CONFIG, corpus=corpora).problems()
    assert problem == "data.corpus: from step 100 on every weight is 0; give one corpus more"
    corpora["b"]["weight"] = [[0, 0], [100, 1]]
    assert dataclasses.replace(CONFIG, corpus=corpora).problems() == []


def test_a_corpus_may_have_fields_of_its_own(folder: Path):
    (folder / "d.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": "yes" * 20}) + "\n" for i in range(90)))
    mixture = mixture_of(folder, a=1, d={"text_field": "a", "prompt_field": "q"})
    assert mixture.shares(0) == [CREDITS_PER_ROW // 2] * 2
    [stream, *_] = streams_of(mixture).values()
    rows = [stream.take(s) for s in range(20)]
    prompts = {k: {int((~part.pairs.trained).sum()) for j, parts in rows if j == k for part in parts} for k in (0, 1)}
    assert prompts[0] == {0}
    assert prompts[1] <= {2, 3}
    assert list(mixture.fingerprints()) == ["data.corpus['a']", "data.corpus['d']"]


def test_what_is_wrong_with_all_corpora_is_said_at_once(folder: Path):
    with pytest.raises(InputError) as caught:
        mixture_of(folder, a=1, none=1, neither={"weight": 2})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all("there is no such file or folder" in line for line in lines)
    assert [line.split(" = ")[0] for line in lines] == ["data.corpus['neither']", "data.corpus['none']"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("text", "must hold fields"),
        ({}, "has no 'corpus'"),
        ({"corpus": "x", "wieght": 1}, "unknown field 'wieght'"),
        ({"corpus": "x", "weight": 0}, "weight is 0"),
        ({"corpus": "x", "weight": True}, "weight is True"),
        ({"corpus": "x", "weight": [[0, 1], [0, 2]]}, "weight is [[0, 1], [0, 2]]"),
        ({"corpus": "x", "weight": [[5, 1]]}, "steps that rise from 0"),
        ({"corpus": "x", "weight": [[0, 0], [5, 0]]}, "weight is"),
        ({"corpus": "x", "epochs": 0}, "epochs is 0"),
        ({"corpus": "x", "text_field": 3}, "text_field is 3"),
        ({"corpus": "x", "text_field": None}, "text_field is None"),
        ({"corpus": "x", "text_separator": "a\nb"}, "it must be one line"),
        ({"corpus": "x", "text_separator": "\ud800"}, "['text_separator'] is not valid UTF-8"),
    ],
)
def test_a_corpus_of_a_mixture_is_checked(values, words: str):
    [problem] = dataclasses.replace(CONFIG, corpus={"one": values}).problems()
    assert problem.startswith("data.corpus['one']")
    assert words in problem


def texts(parts) -> list[tuple[str, int, int]]:
    return [(part.pairs.document.text, part.begin, part.end) for part in parts]
