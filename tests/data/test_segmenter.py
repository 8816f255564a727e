"""Documents to rows: every token a target once, masks and positions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.segmenter import make_pairs, segment_documents, segments

E = 0
documents = st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=12)


def test_a_document_is_pairs_from_the_end_token_to_the_end_token():
    pairs = make_pairs(np.array([5, 6, 7]), E)
    assert pairs.inputs.tolist() == [E, 5, 6, 7]
    assert pairs.targets.tolist() == [5, 6, 7, E]
    open_end = make_pairs(np.array([5, 6, 7]), E, ends=False)
    assert open_end.inputs.tolist() == [E, 5, 6]
    assert open_end.targets.tolist() == [5, 6, 7]


def test_rows_of_an_example_masked():
    rows = list(segment_documents([np.array([1, 2, 3]), np.array([4])], E, DataConfig(segment_length=4)))
    assert [row["tokens"].tolist() for row in rows] == [[E, 1, 2, 3], [E, 4, 0, 0]]
    assert [row["targets"].tolist() for row in rows] == [[1, 2, 3, E], [4, E, 0, 0]]
    rows = list(segment_documents([np.array([1, 2]), np.array([3, 4])], E, DataConfig(segment_length=4)))
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 1, 2], [1, 1, 0, 0]]
    assert [row["positions"].tolist() for row in rows] == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert [row["loss_weights"].tolist() for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_rows_of_an_example_without_masks():
    config = DataConfig(segment_length=4, mask_documents=False)
    rows = list(segment_documents([np.array([1, 2]), np.array([3, 4])], E, config))
    assert [row["segment_ids"].tolist() for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [row["positions"].tolist() for row in rows] == [[0, 1, 2, 3], [0, 1, 0, 0]]


@pytest.mark.parametrize("mask", [True, False])
@given(documents=documents, T=st.integers(1, 17))
def test_every_token_and_every_end_is_a_target_exactly_once(documents, T, mask):
    config = DataConfig(segment_length=T, mask_documents=mask)
    rows = list(segment_documents(map(np.array, documents), E, config))
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


@given(documents=documents, T=st.integers(1, 9), first=st.integers(0, 8))
def test_rows_may_begin_inside_a_document(documents, T, first):
    config = DataConfig(segment_length=T)
    pairs = [make_pairs(np.array(document), E) for document in documents]
    whole = np.concatenate([pair.targets for pair in pairs] or [np.array([], int)])
    if pairs and first < len(pairs[0].targets):
        pairs[0] = pairs[0]._replace(first=first)
        whole = whole[first:]
    rows = [row for row, _ in segments(pairs, config)]
    found = np.concatenate([row["targets"][row["loss_weights"] > 0] for row in rows] or [np.array([], int)])
    np.testing.assert_array_equal(found, whole)
