"""The order of the data: one of V virtual readers, and its position.

With h(…) = 64 bits of BLAKE2b, epoch e of stream v of V is

1. the chunks of the corpus, sorted by h("chunk", seed, e, chunk), of which v takes every V-th from the v-th on;
2. their documents, in that order, cut into windows: a window closes with the document that fills `shuffle_window`;
3. the documents of each window, sorted by h("document", seed, e, file, place).

Where there are fewer chunks than streams, all streams read the same windows, of all chunks; each document goes, in the
order of 3, to the stream that has the least text of the window so far, of equals to the one with the least
h("deal", seed, e, chunk, place, v), with the chunk's number and the place at which the window begins.

Nothing in it depends on machines, processes or workers (C1). A position is a few numbers: the epoch, chunk and place
at which a window begins, and how much of the window is done. Restoring one reads a single window (of a compressed file,
what stands before it too). After its last window a stream goes on with its own next epoch.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.config import ResolvedDataConfig
from data.corpus import Corpus, Document, stable_hash
from data.errors import InputError
from data.segmenter import DocumentPairs, SegmentPart, concatenate, make_pairs, pack

Tokenize = Callable[[Iterable[str]], Iterator[np.ndarray]]

# Chunks are dealt anew in each epoch, so a stream without documents may have some in a later one; not after so many.
MAX_EMPTY_EPOCHS = 100


class WindowStart(NamedTuple):
    """Where a window begins: the epoch, the number of the chunk in the reader's order, the place in it (0: its own)."""

    epoch: int = 0
    chunk: int = 0
    place: int = 0


class StreamPosition(NamedTuple):
    """Where a stream's next row begins.

    Attributes:
        epoch, chunk, place: the window's `WindowStart`.
        item: of its documents, the one with the next pair; where rows are packed, the next of its rows.
        pair: the next of the document's pairs.
    """

    epoch: int = 0
    chunk: int = 0
    place: int = 0
    item: int = 0
    pair: int = 0

    @property
    def start(self) -> WindowStart:
        """Of the window."""
        return WindowStart(*self[:3])


BEGINNING = StreamPosition()


class Window(NamedTuple):
    """A stream's documents of a window, in their order, and where the next window begins."""

    documents: list[Document]
    next: WindowStart


class WindowReader:
    """The windows of some chunks, read one after the other: of one stream's, or of all for the streams that share them.

    Args:
        corpus: the text.
        config: of the data.
        seed: of the order.
        starts: of each stream of this process that reads here, the window that it begins with.
    """

    def __init__(self, corpus: Corpus, config: ResolvedDataConfig, seed: int, starts: Mapping[int, WindowStart]):
        self._corpus, self._config, self._seed, self._starts = corpus, config, seed, starts
        self._num_streams = config.num_streams
        self._windows = self._read(min(starts.values()))
        # What each stream has still to take.
        self._waiting: dict[tuple[int, WindowStart], Window] = {}

    def take(self, stream: int, start: WindowStart) -> Window:
        """The stream's part of the window that begins here. Each stream takes one window after the other."""
        while (stream, start) not in self._waiting:
            begin, documents, following = next(self._windows)
            assert begin <= start, f"no window begins at {start}"
            parts = self._deal(documents, begin)
            for v, first in self._starts.items():
                if first <= begin:
                    self._waiting[v, begin] = Window(parts[v], following)
        return self._waiting.pop((stream, start))

    def _read(self, start: WindowStart) -> Iterator[tuple[WindowStart, list[Document], WindowStart]]:
        """(where it begins, its documents, where the next begins) of each window from one on, forever."""
        epoch, first, place = start
        while True:
            documents: list[Document] = []
            size = 0
            chunks = self._corpus.order(self._seed, epoch)
            if not self._corpus.shared:
                [stream] = self._starts
                chunks = chunks[stream :: self._num_streams]
            for c in range(first, len(chunks)):
                for document in self._corpus.documents(chunks[c], place):
                    if size >= self._config.shuffle_window:
                        following = WindowStart(epoch, c, document.place)
                        yield start, self._shuffled(documents, epoch), following
                        documents, size, start = [], 0, following
                    documents.append(document)
                    size += len(document.prompt) + len(document.text)
                place = 0
            following = WindowStart(epoch + 1)
            yield start, self._shuffled(documents, epoch), following
            epoch, first, start = epoch + 1, 0, following

    def _shuffled(self, documents: list[Document], epoch: int) -> list[Document]:
        return sorted(documents, key=lambda d: stable_hash("document", self._seed, epoch, d.file, d.place))

    def _deal(self, documents: list[Document], start: WindowStart) -> Mapping[int, list[Document]]:
        """Each stream's part of a window."""
        if not self._corpus.shared:
            return dict.fromkeys(self._starts, documents)
        parts: dict[int, list[Document]] = {v: [] for v in range(self._num_streams)}
        # A heap of (characters so far, whose turn it is among equals, stream).
        least = [(0, stable_hash("deal", self._seed, *start, v), v) for v in parts]
        heapq.heapify(least)
        for document in documents:
            size, turn, v = least[0]
            parts[v].append(document)
            heapq.heapreplace(least, (size + len(document.prompt) + len(document.text), turn, v))
        return parts


def open_readers(
    corpus: Corpus, config: ResolvedDataConfig, seed: int, positions: Mapping[int, StreamPosition]
) -> Mapping[int, WindowReader]:
    """What each stream reads, by the positions at which they begin: its own reader, or one for all."""
    starts = {v: position.start for v, position in positions.items()}
    if corpus.shared and starts:
        return dict.fromkeys(starts, WindowReader(corpus, config, seed, starts))
    return {v: WindowReader(corpus, config, seed, {v: start}) for v, start in starts.items()}


class Stream:
    """An iterator of (the parts of a row, the position after it); it ends after `config.epochs`, if that is given.

    Args:
        reader: of its windows.
        tokenize: texts → their tokens, int32, lazily and in order.
        bos_id: the token before a document.
        eos_id: the one after it.
        config: of the data.
        stream: v.
        position: where the next row begins.

    Raises:
        InputError: its chunks hold no document in `MAX_EMPTY_EPOCHS` epochs running.
    """

    def __init__(
        self,
        reader: WindowReader,
        tokenize: Tokenize,
        bos_id: int,
        eos_id: int,
        config: ResolvedDataConfig,
        stream: int,
        position: StreamPosition = BEGINNING,
    ):
        self._reader, self._tokenize, self._bos_id, self._eos_id = reader, tokenize, bos_id, eos_id
        self._config, self._stream = config, stream
        self._rows = (self._packed if config.segmentation == "pack" else self._concatenated)(position)

    def __iter__(self) -> Iterator[tuple[list[SegmentPart], StreamPosition]]:
        return self

    def __next__(self) -> tuple[list[SegmentPart], StreamPosition]:
        return next(self._rows)

    def _windows(self, start: WindowStart) -> Iterator[tuple[WindowStart, Window]]:
        """The stream's windows from one on, with where they begin."""
        epochs, last = self._config.epochs, start.epoch
        while epochs is None or start.epoch < epochs:
            window = self._reader.take(self._stream, start)
            if window.documents:
                last = start.epoch
            elif start.epoch - last >= MAX_EMPTY_EPOCHS:
                raise InputError(
                    f"data.corpus has no document for stream {self._stream} of data.num_streams = "
                    f"{self._config.num_streams}; lower data.num_streams (and train.batch_size), or give more text"
                )
            yield start, window
            start = window.next

    def _pairs(self, documents: Sequence[Document], first: int = 0) -> Iterator[DocumentPairs]:
        """Of each document; the first begins at this pair."""
        tokens = self._tokenize(text for d in documents for text in ((d.prompt, d.text) if d.prompt else (d.text,)))
        for document in documents:
            prompt = next(tokens) if document.prompt else None
            ids, length = next(tokens), 0
            if prompt is not None:
                ids, length = np.concatenate([prompt, ids]), len(prompt)
            yield make_pairs(ids, self._bos_id, self._eos_id, document.ends, first, length, document)
            first = 0

    def _concatenated(self, position: StreamPosition) -> Iterator[tuple[list[SegmentPart], StreamPosition]]:
        at = [position]  # of the newest document; its next pair is what `concatenate` says

        def documents() -> Iterator[DocumentPairs]:
            item, pair = position.item, position.pair
            for start, window in self._windows(position.start):
                for i, pairs in enumerate(self._pairs(window.documents[item:], pair), start=item):
                    at[0] = StreamPosition(*start, i)
                    yield pairs
                item = pair = 0

        for parts, pair in concatenate(documents(), self._config):
            yield parts, at[0]._replace(pair=pair)

    def _packed(self, position: StreamPosition) -> Iterator[tuple[list[SegmentPart], StreamPosition]]:
        first = position.item
        for start, window in self._windows(position.start):
            rows = pack(list(self._pairs(window.documents)), self._config)
            for i in range(first, len(rows)):
                yield rows[i], StreamPosition(*start, i + 1)
            first = 0
