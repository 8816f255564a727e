"""Documents to rows: every token a target once, masks and positions, packing."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.segmenter import DocumentPairs, SegmentPart, concatenate, make_pairs, make_segment, pack, segment_documents

B, E = 98, 0
documents = st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12)


def pairs_of(*documents: list[int]) -> list[DocumentPairs]:
    return [make_pairs(np.array(document, np.int32), [E], E) for document in documents]


def trained(rows: list[list[SegmentPart]], config: DataConfig) -> list[tuple[int, int]]:
    """(input, target) of every position with weight."""
    found = []
    for row in (make_segment(parts, config) for parts in rows):
        here = row["loss_weights"] > 0
        found += zip(row["tokens"][here].tolist(), row["targets"][here].tolist(), strict=True)
    return found


def test_a_document_is_pairs_from_the_token_before_it_to_the_end_token():
    pairs = make_pairs(np.array([5, 6, 7]), [B], E)
    assert pairs.inputs.tolist() == [B, 5, 6, 7]
    assert pairs.targets.tolist() == [5, 6, 7, E]
    open_end = make_pairs(np.array([5, 6, 7]), [B], E, ends=False)
    assert open_end.inputs.tolist() == [B, 5, 6]
    assert open_end.targets.tolist() == [5, 6, 7]


def test_of_several_tokens_before_a_document_none_is_a_target_that_is_trained_on():
    pairs = make_pairs(np.array([5, 6, 7]), [B, 3], E, prompt_length=1)
    assert pairs.inputs.tolist() == [B, 3, 5, 6, 7]
    assert pairs.targets.tolist() == [3, 5, 6, 7, E]
    assert pairs.trained.tolist() == [False, False, True, True, True]


def test_rows_of_an_example_masked():
    rows = list(segment_documents(pairs_of([1, 2, 3], [4]), DataConfig(segment_length=4)))
    assert [row["tokens"].tolist() for row in rows] == [[E, 1, 2, 3], [E, 4, 0, 0]]
    assert [row["targets"].tolist() for row in rows] == [[1, 2, 3, E], [4, E, 0, 0]]
    rows = list(segment_documents(pairs_of([1, 2], [3, 4]), DataConfig(segment_length=4)))
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert [row["positions"].tolist() for row in rows] == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert [row["loss_weights"].tolist() for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("mask", "restart", "positions"),
    [(False, None, [[0, 1, 2, 3], [0, 1, 0, 0]]), (False, True, [[0, 1, 2, 0], [0, 1, 0, 0]]),
     (True, False, [[0, 1, 2, 3], [0, 1, 0, 0]]), (True, None, [[0, 1, 2, 0], [0, 1, 0, 0]])],
)  # fmt: skip
def test_masks_and_positions_are_chosen_apart(mask, restart, positions):
    config = DataConfig(segment_length=4, document_mask=mask, restart_positions=restart)
    rows = list(segment_documents(pairs_of([1, 2], [3, 4]), config))
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 1, 1 + mask], [1, 1, 0, 0]]
    assert [row["positions"].tolist() for row in rows] == positions


@pytest.mark.parametrize("mask", [True, False])
@given(documents=documents, T=st.integers(1, 17))
def test_every_token_and_every_end_is_a_target_exactly_once(documents, T, mask):
    config = DataConfig(segment_length=T, document_mask=mask)
    rows = list(segment_documents(pairs_of(*documents), config))
    kept = [row["loss_weights"] > 0 for row in rows]
    targets = [t for row, here in zip(rows, kept, strict=True) for t in row["targets"][here].tolist()]
    assert targets == [t for document in documents for t in [*document, E]]
    inputs = [t for row, here in zip(rows, kept, strict=True) for t in row["tokens"][here].tolist()]
    assert inputs == [t for document in documents for t in [E, *document]]
    assert all(here.all() for here in kept[:-1])
    for row in rows:
        assert row["tokens"].shape == (T,)
        # A position's token is the target of the position before it, inside a document's part.
        same = (row["segment_ids"][1:] == row["segment_ids"][:-1]) & (row["tokens"][1:] != E)
        assert (row["tokens"][1:] == row["targets"][:-1])[same].all()


@given(documents=documents, T=st.integers(2, 9))
def test_a_last_position_that_is_not_trained_on_is_the_next_rows_first(documents, T):
    config = DataConfig(segment_length=T, train_last_position=False)
    rows = [parts for parts, _ in concatenate(pairs_of(*documents), config)]
    everything = [pair for document in documents for pair in itertools.pairwise([E, *document, E])]
    assert trained(rows, config) == everything
    filled = [make_segment(parts, config) for parts in rows]
    assert all(row["loss_weights"][-1] == 0 for row in filled)
    for row, following in itertools.pairwise(filled):
        assert (row["tokens"][-1], row["targets"][-1]) == (following["tokens"][0], following["targets"][0])
    assert Counter(trained(pack(pairs_of(*documents), config), config)) == Counter(everything)


@given(documents=documents, T=st.integers(1, 9), first=st.integers(0, 8), last=st.booleans())
def test_rows_may_begin_inside_a_document(documents, T, first, last):
    config = DataConfig(segment_length=T + 1, train_last_position=last)
    pairs = pairs_of(*documents)
    whole = [pair for document in documents for pair in itertools.pairwise([E, *document, E])]
    if pairs and first < len(pairs[0].targets):
        pairs[0] = pairs[0]._replace(first_pair=first)
        whole = whole[first:]
    assert trained([parts for parts, _ in concatenate(pairs, config)], config) == whole


@given(documents=documents, T=st.integers(1, 17))
def test_packing_loses_nothing_and_cuts_only_what_is_longer_than_a_row(documents, T):
    config = DataConfig(segment_length=T, segmentation="pack")
    rows = pack(pairs_of(*documents), config)
    everything = [pair for document in documents for pair in itertools.pairwise([E, *document, E])]
    assert Counter(trained(rows, config)) == Counter(everything)
    for part in (part for parts in rows for part in parts):
        length = len(part.pairs.inputs)
        assert part.end - part.begin == T or part.end == length
        assert part.begin % T == 0
        assert length > T or part.begin == 0
    # No two rows would fit into one, or best fit has not been done.
    sizes = sorted(sum(part.end - part.begin for part in parts) for parts in rows)
    assert all(one + other > T for one, other in itertools.pairwise(sizes))


def test_packing_puts_each_document_where_least_is_left():
    config = DataConfig(segment_length=10, segmentation="pack")
    # Pairs: 7, 6, 4, 3: best fit puts 4 to 6 and 3 to 7, and both rows are full.
    rows = pack(pairs_of([1] * 6, [2] * 5, [3] * 3, [4] * 2), config)
    assert [[int(part.pairs.targets[0]) for part in parts] for parts in rows] == [[1, 4], [2, 3]]
    row = make_segment(rows[0], config)
    assert row["segment_ids"].tolist() == [1] * 7 + [2] * 3
    assert row["positions"].tolist() == [*range(7), *range(3)]


def test_a_prompt_is_seen_and_not_trained_on():
    config = DataConfig(segment_length=4)
    pairs = make_pairs(np.array([1, 2, 3, 4, 5]), [E], E, prompt_length=2)
    rows = [make_segment(parts, config) for parts, _ in concatenate([pairs], config)]
    assert [row["targets"].tolist() for row in rows] == [[1, 2, 3, 4], [5, E, 0, 0]]
    assert [row["loss_weights"].tolist() for row in rows] == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert rows[0]["segment_ids"].tolist() == [1, 1, 1, 1]
