"""Documents to segments: the positions that the model sees at once.

A document of tokens t1 … tn is n + 1 pairs of input and target: B → t1, t1 → t2, …, tn → E, where E is the end-of-text
token, and B the token before a document: E too, unless the tokenizer has one of its own. Every token, and the end, is
therefore a target exactly once. A row consists of parts of documents and holds `segment_length` pairs. A piece that is
not the end of its document has no last pair, because E does not follow it. The pairs of a prompt are inputs without
weight. A conversation (see `data.conversations`) has neither B nor E: its template writes what stands at its ends.

A pair of answers is one document of two sequences, the chosen and the rejected answer, each with its prompt. Both are
in one row, one after the other, with the segment ids 2k − 1 and 2k.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data.config import DataConfig

Segment = dict[str, np.ndarray]


class DocumentPairs(NamedTuple):
    """Inputs and targets of a document, int32 [n + 1].

    Attributes:
        trained: true for the pairs that are trained on, bool [n + 1].
        first_pair: pair at which the rows begin.
        document: the source document, kept for `describe_row`.
        infill: its `data.infilling.Infill`, if it is trained on with its middle last, kept for the same.
        rejected: for a pair, whose chosen answer the others are, the same of the rejected answer.
    """

    inputs: np.ndarray
    targets: np.ndarray
    trained: np.ndarray
    first_pair: int = 0
    document: Any = None
    infill: Any = None
    rejected: Any = None

    @property
    def sequences(self) -> "list[DocumentPairs]":
        """The document itself, or the two answers of a pair."""
        return [self, self.rejected] if self.rejected else [self]

    @property
    def length(self) -> int:
        """The number of its inputs, those of both answers of a pair."""
        return sum(len(sequence.inputs) for sequence in self.sequences)


class SegmentPart(NamedTuple):
    """The pairs `begin` to `end` of a document, in a row; a pair of answers is never cut."""

    pairs: DocumentPairs
    begin: int
    end: int


def make_pairs(
    tokens: np.ndarray,
    bos_ids: Sequence[int],
    eos_id: int,
    ends: bool = True,
    first_pair: int = 0,
    prompt_length: int = 0,
    document: Any = None,
) -> DocumentPairs:
    """Makes the pairs of a document's tokens, int32 [n], of which the first `prompt_length` are not trained on.

    Nor are `bos_ids`, which come before them, at least one.
    """
    before = len(bos_ids)
    around = np.empty(before + len(tokens) + 1, np.int32)
    around[:before], around[before:-1], around[-1] = bos_ids, tokens, eos_id
    last = len(around) if ends else len(around) - 1
    trained = np.arange(last - 1) >= before - 1 + prompt_length
    return DocumentPairs(around[: last - 1], around[1:last], trained, first_pair, document)


def concatenate(documents: Iterable[DocumentPairs], config: DataConfig) -> Iterator[tuple[list[SegmentPart], int]]:
    """Yields (parts of a row, pair of the newest document with which the next row begins) of concatenated documents.

    The last row may hold fewer pairs.
    """
    T = config.segment_length
    parts: list[SegmentPart] = []
    filled = begin = 0
    for pairs in documents:
        begin = pairs.first_pair
        while begin < len(pairs.inputs):
            end = min(begin + T - filled, len(pairs.inputs))
            parts.append(SegmentPart(pairs, begin, end))
            filled, begin = filled + end - begin, end
            if filled == T:
                # A last position that is not trained on is the next row's first.
                begin -= not config.train_last_position
                yield parts, begin
                parts, filled = [], 0
    if parts:
        yield parts, begin


def row_length(config: DataConfig) -> int:
    """Returns the pairs of a row with packed documents that are trained on."""
    return config.segment_length if config.train_last_position else config.segment_length - 1


def sequences_in(parts: Iterable[SegmentPart]) -> Iterator[SegmentPart]:
    """Yields the parts of a row with the two answers of a pair apart."""
    for part in parts:
        if part.pairs.rejected:
            yield from (SegmentPart(answer, 0, len(answer.inputs)) for answer in part.pairs.sequences)
        else:
            yield part


def fill_rows(documents: Sequence[DocumentPairs], config: DataConfig) -> list[list[SegmentPart]]:
    """Returns the rows of a window's documents: one for each, or as `pack` fills them."""
    if config.segmentation == "document":
        return [[SegmentPart(pairs, 0, pairs.length)] for pairs in documents]
    return pack(documents, config)


def pack(documents: Sequence[DocumentPairs], config: DataConfig) -> list[list[SegmentPart]]:
    """Packs the documents of a window, whole, into few rows by best fit: the longest first, each into the fullest row.

    A document longer than a row, which no pair of answers may be, is cut into rows, and the rest is packed like a
    document. Rows come in the order of their first documents, parts in the order of the documents. (Best fit
    decreasing: Johnson 1973; for pretraining: Ding et al. 2024, arXiv:2404.10830.)
    """
    T = row_length(config)
    assert not any(pairs.rejected and pairs.length > T for pairs in documents)
    # (document, its pairs' begin and end)
    pieces = [
        (d, begin, min(begin + T, pairs.length))
        for d, pairs in enumerate(documents)
        for begin in range(0, pairs.length, T)
    ]
    rows: list[list[tuple[int, int, int]]] = []
    spaces: list[tuple[int, int]] = []  # (pairs that still fit, row) of each row with space, in order
    for d, begin, end in sorted(pieces, key=lambda piece: piece[1] - piece[2]):
        place = bisect.bisect_left(spaces, (end - begin, 0))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = T, len(rows)
            rows.append([])
        rows[row].append((d, begin, end))
        if space > end - begin:
            bisect.insort(spaces, (space - (end - begin), row))
    return [[SegmentPart(documents[d], begin, end) for d, begin, end in row] for row in sorted(map(sorted, rows))]


def make_segment(parts: Sequence[SegmentPart], config: DataConfig) -> Segment:
    """Makes the row of some parts.

    Returns:
        `tokens`, `targets`, `positions`, `segment_ids` (int32) and `loss_weights` (float32), each [T]. With
        `document_mask` each part has its own segment id, from 1 on; with `restarts` its positions start at 0. The
        unused rest of the row has segment id 0 and no weight.
    """
    T = config.segment_length
    row = {name: np.zeros(T, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    row["loss_weights"] = np.zeros(T, np.float32)
    filled = 0
    counted = np.arange(T, dtype=np.int32)
    for number, (pairs, begin, end) in enumerate(sequences_in(parts), start=1):
        span = slice(filled, filled + end - begin)
        row["tokens"][span] = pairs.inputs[begin:end]
        row["targets"][span] = pairs.targets[begin:end]
        row["positions"][span] = counted[: end - begin] if config.restarts else counted[span]
        row["segment_ids"][span] = number if config.document_mask else 1
        row["loss_weights"][span] = pairs.trained[begin:end]
        filled += end - begin
    if not config.train_last_position:
        row["loss_weights"][-1] = 0
    return row


def segment_documents(documents: Iterable[DocumentPairs], config: DataConfig) -> Iterator[Segment]:
    """Yields rows of a finite number of concatenated documents, with all of their pairs trained on."""
    whole = dataclasses.replace(config, train_last_position=True)
    for parts, _ in concatenate(documents, whole):
        yield make_segment(parts, whole)
