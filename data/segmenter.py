"""Documents to segments: what the model sees at once.

A document of tokens t1 … tn is n + 1 pairs of input and target: E → t1, t1 → t2, …, tn → E, where E is the end-of-text
token, which also begins each document. So every token, and the end, is a target exactly once. All pairs stand one
after the other, and a row is `segment_length` consecutive ones. A piece that its document does not end with has no last
pair: what follows it is not E.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data.config import DataConfig

Row = dict[str, np.ndarray]


class Pairs(NamedTuple):
    """Inputs and targets of a document, int32 [n + 1]; `first` is the pair at which the rows begin."""

    inputs: np.ndarray
    targets: np.ndarray
    first: int = 0


def make_pairs(tokens: np.ndarray, eos_id: int, ends: bool = True, first: int = 0) -> Pairs:
    """The pairs of a document's tokens, int32 [n]."""
    around = np.concatenate([[eos_id], tokens, [eos_id]]).astype(np.int32)
    last = len(around) if ends else len(around) - 1
    return Pairs(around[: last - 1], around[1:last], first)


def segments(documents: Iterable[Pairs], config: DataConfig) -> Iterator[tuple[Row, int]]:
    """Rows of T = `segment_length` positions.

    Yields:
        (row, how many pairs of the newest document are in this and earlier rows). A row holds `tokens`, `targets`,
        `positions`, `segment_ids` (int32) and `loss_weights` (float32), each [T]. With `mask_documents` every
        document's part of a row has its own segment id, from 1 on, and its positions begin at 0. Where the documents
        end, the last row is filled up with positions of segment id 0 and no weight.
    """
    T = config.segment_length
    row, filled, parts = empty_row(T), 0, 0
    for inputs, targets, begin in documents:
        while begin < len(inputs):
            count = min(T - filled, len(inputs) - begin)
            here, parts = slice(filled, filled + count), parts + 1
            row["tokens"][here] = inputs[begin : begin + count]
            row["targets"][here] = targets[begin : begin + count]
            row["positions"][here] = np.arange(count) + (0 if config.mask_documents else filled)
            row["segment_ids"][here] = parts if config.mask_documents else 1
            row["loss_weights"][here] = 1
            filled, begin = filled + count, begin + count
            if filled == T:
                yield row, begin
                row, filled, parts = empty_row(T), 0, 0
    if filled:
        yield row, 0


def empty_row(T: int) -> Row:
    """A row of no weight."""
    row = {name: np.zeros(T, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    return row | {"loss_weights": np.zeros(T, np.float32)}


def segment_documents(documents: Iterable[np.ndarray], eos_id: int, config: DataConfig) -> Iterator[Row]:
    """Rows of a finite number of whole documents, given as their tokens."""
    for row, _ in segments((make_pairs(tokens, eos_id) for tokens in documents), config):
        yield row
