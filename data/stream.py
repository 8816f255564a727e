"""The order of the data: one of V virtual readers, and its position.

With h(…) = 64 bits of BLAKE2b, epoch e of stream v of V is

1. the chunks of the corpus, sorted by h("chunk", seed, e, chunk), of which v takes every V-th from the v-th on;
2. their documents, in that order, cut into windows: a window closes with the document that fills `shuffle_window`;
3. the documents of each window, sorted by h("document", seed, e, file, place).

If there are fewer chunks than streams, all streams read the same windows, of all chunks; each document, in the order
of 3, goes to the stream that has the least text of the window so far, among equals to the one with the least
h("deal", seed, e, chunk, place, v), with the index of the chunk and the place at which the window begins. With
`shuffle_rows`, the packed rows of a window are sorted by h("row", seed, e, chunk, place, v, number of the row).

The order does not depend on machines, processes or threads (C1). A position is a few numbers: the epoch, chunk and
place at which a window begins, and how much of the window is done. Restoring one reads a single window (and the content
before it in a compressed file). After its last window, a stream continues with its own next epoch.
"""

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.config import ResolvedDataConfig
from data.conversations import EncodeMarked, conversation_pairs
from data.corpus import Corpus, stable_hash
from data.document import Document
from data.errors import BadText, InputError
from data.infilling import Infilling, Pieces
from data.segmenter import DocumentPairs, SegmentPart, concatenate, fill_rows, make_pairs, row_length

Tokenize = Callable[[Iterable[str]], Iterator[np.ndarray]]
# Rows of a stream: the parts of each, and the position after it.
Rows = Iterator[tuple[list[SegmentPart], "StreamPosition"]]

# Chunks are dealt again in each epoch, so a stream without documents may get some later, but not after this many.
MAX_EMPTY_EPOCHS = 100


class WindowStart(NamedTuple):
    """The start of a window: the epoch, the chunk's index in the reader's order, and the place in it (0: its own)."""

    epoch: int = 0
    chunk: int = 0
    place: int = 0


class StreamPosition(NamedTuple):
    """The position of a stream's next row.

    Attributes:
        epoch, chunk, place: start of the window (see `WindowStart`).
        item: index of the window's document with the next pair; with packed rows, index of the next row.
        pair: index of that document's next pair.
    """

    epoch: int = 0
    chunk: int = 0
    place: int = 0
    item: int = 0
    pair: int = 0

    @property
    def start(self) -> WindowStart:
        """The start of the window."""
        return WindowStart(*self[:3])


BEGINNING = StreamPosition()


class Window(NamedTuple):
    """A stream's documents of a window, in order, and the start of the next window."""

    documents: list[Document]
    next: WindowStart


class WindowReader:
    """Reads the windows of some chunks in order, for one stream, or for all streams that share them.

    Args:
        starts: the first window of each stream of this process that reads here.
    """

    def __init__(self, corpus: Corpus, config: ResolvedDataConfig, seed: int, starts: Mapping[int, WindowStart]):
        self.corpus, self.seed, self._config, self._starts = corpus, seed, config, starts
        self._windows = self._read(min(starts.values()))
        # Documents that each stream has still to take.
        self._waiting: dict[tuple[int, WindowStart], Window] = {}

    def take(self, stream: int, start: WindowStart) -> Window:
        """Returns the stream's documents of the window at a start. Each stream takes consecutive windows."""
        while (stream, start) not in self._waiting:
            begin, documents, following = next(self._windows)
            assert begin <= start, f"no window begins at {start}"
            documents_of = self._deal(documents, begin)
            for v, first in self._starts.items():
                if first <= begin:
                    self._waiting[v, begin] = Window(documents_of[v], following)
        return self._waiting.pop((stream, start))

    def _read(self, start: WindowStart) -> Iterator[tuple[WindowStart, list[Document], WindowStart]]:
        """Yields (start, documents, start of the next) for each window from one on, forever."""
        epoch, first, place = start
        while True:
            documents: list[Document] = []
            size = 0
            chunks = self.corpus.order(self.seed, epoch)
            if not self.corpus.shared:
                [v] = self._starts
                chunks = chunks[v :: self._config.num_streams]
            for c in range(first, len(chunks)):
                for document in self.corpus.documents(chunks[c], place):
                    if size >= self._config.shuffle_window:
                        following = WindowStart(epoch, c, document.place)
                        yield start, self._shuffled(documents, epoch), following
                        documents, size, start = [], 0, following
                    documents.append(document)
                    size += document.characters
                place = 0
            following = WindowStart(epoch + 1)
            yield start, self._shuffled(documents, epoch), following
            epoch, first, start = epoch + 1, 0, following

    def _shuffled(self, documents: list[Document], epoch: int) -> list[Document]:
        return sorted(documents, key=lambda d: stable_hash("document", self.seed, epoch, d.file, d.place))

    def _deal(self, documents: list[Document], start: WindowStart) -> Mapping[int, list[Document]]:
        """Returns each stream's documents of a window."""
        if not self.corpus.shared:
            return dict.fromkeys(self._starts, documents)
        documents_of: dict[int, list[Document]] = {v: [] for v in range(self._config.num_streams)}
        # A heap of (characters so far, rank among equals, stream).
        least = [(0, stable_hash("deal", self.seed, *start, v), v) for v in documents_of]
        heapq.heapify(least)
        for document in documents:
            size, rank, v = least[0]
            documents_of[v].append(document)
            heapq.heapreplace(least, (size + document.characters, rank, v))
        return documents_of


def open_readers(
    corpus: Corpus, config: ResolvedDataConfig, seed: int, positions: Mapping[int, StreamPosition]
) -> Mapping[int, WindowReader]:
    """Returns the reader of each stream by their first positions: one for each, or one for all."""
    starts = {v: position.start for v, position in positions.items()}
    if corpus.shared and starts:
        return dict.fromkeys(starts, WindowReader(corpus, config, seed, starts))
    return {v: WindowReader(corpus, config, seed, {v: start}) for v, start in starts.items()}


def document_pairs(
    documents: Sequence[Document],
    tokenize: Tokenize,
    bos_ids: Sequence[int],
    eos_id: int,
    infilling: Infilling | None = None,
    first: int = 0,
    encode_marked: EncodeMarked | None = None,
) -> Iterator[DocumentPairs]:
    """Yields the pairs of each document, transformed by `infilling`; the first document begins at its pair `first`.

    Conversations are tokenized whole, with their marks, by `encode_marked`.
    """

    def pieces(document: Document) -> tuple[Pieces, ...]:
        if document.rejected:
            return [document.prompt], [document.text], [document.rejected.text]
        infill = infilling and infilling.infill(document)
        prompt: Pieces = [document.prompt]
        text: Pieces = infill.pieces(document.text) if infill else [document.text]
        return (infilling.without_marks(prompt), infilling.without_marks(text)) if infilling else (prompt, text)

    # Texts are tokenized ahead, so the pieces of a document are made twice, and never kept for a whole window.
    tokens = tokenize(
        piece
        for d in documents
        if d.answers is None
        for part in pieces(d)
        for piece in part
        if isinstance(piece, str) and piece
    )

    def encoded(part: Pieces) -> list[np.ndarray]:
        return [
            next(tokens) if isinstance(piece, str) else np.array([piece], np.int32) for piece in part if piece != ""
        ]

    for document in documents:
        if document.answers is not None:
            assert encode_marked is not None
            pairs = conversation_pairs(encode_marked, document.text, document.answers, first, document)
            if (other := rejected_of(document)) is not None:
                assert other.answers is not None
                rejected = conversation_pairs(encode_marked, other.text, other.answers, 0, other)
                pairs = pairs._replace(rejected=rejected)
            yield pairs
        else:
            prompt, *texts = map(encoded, pieces(document))
            before = sum(map(len, prompt))
            both = [np.concatenate([np.empty(0, np.int32), *prompt, *text]) for text in texts]
            pairs = make_pairs(both[0], bos_ids, eos_id, document.ends, first, before, document)
            if (other := rejected_of(document)) is not None:
                rejected = make_pairs(both[1], bos_ids, eos_id, True, 0, before, other)
                pairs = pairs._replace(rejected=rejected)
            yield pairs._replace(infill=infilling and infilling.infill(document))
        first = 0


def rejected_of(document: Document) -> Document | None:
    """Returns the rejected answer of a pair as a document of its own; None for other documents."""
    if document.rejected is None:
        return None
    text, answers = document.rejected
    return dataclasses.replace(document, text=text, answers=answers, rejected=None)


def fits(corpus: Corpus, config: ResolvedDataConfig, pairs: DocumentPairs) -> bool:
    """True unless a document that is never cut is longer than a row, and `data.on_bad_document` is skip.

    Raises InputError with file and place if that is error.
    """
    if not config.keeps_whole or pairs.length <= row_length(config):
        return True
    needed = pairs.length + config.segment_length - row_length(config)
    what = f"the document takes {pairs.length} positions"
    if pairs.rejected:
        chosen, rejected = (len(sequence.inputs) for sequence in pairs.sequences)
        what = (
            f"the pair takes {pairs.length} positions, {chosen} for the chosen answer with its prompt and {rejected} "
            "for the rejected"
        )
    problem = f"{what}, and is never cut; give data.segment_length={needed} or more"
    corpus.refuse(pairs.document.file, pairs.document.place, BadText(problem))
    return False


@dataclass(frozen=True)
class Stream:
    """The stream with index v.

    Attributes:
        tokenize: function from texts to their tokens, int32, lazy and in order.
        infilling: transform of the documents, if there is one.
        encode_marked: the tokenizer's, for conversations.
    """

    reader: WindowReader
    tokenize: Tokenize
    bos_ids: Sequence[int]
    eos_id: int
    config: ResolvedDataConfig
    v: int
    infilling: Infilling | None = None
    encode_marked: EncodeMarked | None = None

    def rows(self, position: StreamPosition = BEGINNING) -> Rows:
        """Returns the rows from a position on, to the end of the last epoch, if `config.epochs` is set.

        Raises:
            InputError: the stream's chunks hold no document in `MAX_EMPTY_EPOCHS` consecutive epochs.
        """
        whole = self.config.segmentation != "concatenate"
        return self._packed(position) if whole else self._concatenated(position)

    def _windows(self, start: WindowStart) -> Iterator[tuple[WindowStart, Window]]:
        """Yields the stream's windows from one on, with their starts."""
        last = start.epoch
        while self.config.epochs is None or start.epoch < self.config.epochs:
            window = self.reader.take(self.v, start)
            if window.documents:
                last = start.epoch
            elif start.epoch - last >= MAX_EMPTY_EPOCHS:
                raise InputError(
                    f"{self.reader.corpus.field} has no document for stream {self.v} of data.num_streams = "
                    f"{self.config.num_streams}; lower data.num_streams (and train.batch_size), or give more text"
                )
            yield start, window
            start = window.next

    def _pairs(self, documents: Sequence[Document], first: int = 0) -> Iterator[DocumentPairs]:
        """Yields the pairs of each document; the first document begins at its pair `first`."""
        return document_pairs(
            documents, self.tokenize, self.bos_ids, self.eos_id, self.infilling, first, self.encode_marked
        )

    def _concatenated(self, position: StreamPosition) -> Rows:
        at = [position]  # position of the newest document; `concatenate` knows its next pair

        def documents() -> Iterator[DocumentPairs]:
            item, pair = position.item, position.pair
            for start, window in self._windows(position.start):
                for i, pairs in enumerate(self._pairs(window.documents[item:], pair), start=item):
                    at[0] = StreamPosition(*start, i)
                    yield pairs
                item = pair = 0

        for parts, pair in concatenate(documents(), self.config):
            yield parts, at[0]._replace(pair=pair)

    def _packed(self, position: StreamPosition) -> Rows:
        first = position.item
        for start, window in self._windows(position.start):
            kept = (p for p in self._pairs(window.documents) if fits(self.reader.corpus, self.config, p))
            rows = fill_rows(list(kept), self.config)
            if self.config.shuffle_rows:
                rank = [stable_hash("row", self.reader.seed, *start, self.v, i) for i in range(len(rows))]
                rows = [rows[i] for i in sorted(range(len(rows)), key=rank.__getitem__)]
            for i in range(first, len(rows)):
                yield rows[i], StreamPosition(*start, i + 1)
            first = 0
