"""The order of the data: one of V virtual readers, and its position.

With h(…) = 64 bits of BLAKE2b, epoch e of stream v of V is

1. the chunks of the corpus, sorted by h("chunk", seed, e, chunk), of which v takes every V-th from the v-th on;
2. grouped, in that order, into windows: a window closes once its chunks have `shuffle_bytes`;
3. the documents of each window, sorted by h("document", seed, e, file, offset).

Nothing in it depends on machines, processes or workers (C1). A position is four numbers: epoch, window, document in the
window, pair in the document. Restoring one reads a single window. After its last window a stream goes on with its own
next epoch.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data.config import DataConfig
from data.corpus import Chunk, Corpus, Document, digest
from data.errors import InputError
from data.segmenter import Pairs, Row, make_pairs, segments

Position = tuple[int, int, int, int]
Tokenize = Callable[[Iterable[str]], Iterator[np.ndarray]]

# Chunks are dealt anew in each epoch, so a stream without documents may have some in a later one; not after so many.
EMPTY_EPOCHS = 100


class Stream:
    """An endless iterator of (row, the position after it).

    Args:
        corpus: the text.
        tokenize: texts → their tokens, int32, lazily and in order.
        eos_id: the token that begins and ends documents.
        config: of the data.
        seed: of the order.
        stream: v.
        num_streams: V.
        position: where the next row begins.

    Raises:
        InputError: the stream's chunks hold no document in `EMPTY_EPOCHS` epochs running.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenize: Tokenize,
        eos_id: int,
        config: DataConfig,
        seed: int,
        stream: int,
        num_streams: int,
        position: Position = (0, 0, 0, 0),
    ):
        self.corpus, self.tokenize, self.eos_id, self.config = corpus, tokenize, eos_id, config
        self.seed, self.stream, self.num_streams = seed, stream, num_streams
        self._place = position[:3]
        self._rows = segments(self._pairs(position), config)

    def __iter__(self) -> Iterator[tuple[Row, Position]]:
        return self

    def __next__(self) -> tuple[Row, Position]:
        row, pair = next(self._rows)
        return row, (*self._place, pair)

    def windows(self, epoch: int) -> list[list[Chunk]]:
        """The stream's chunks of one epoch, in order, as windows."""
        windows: list[list[Chunk]] = [[]]
        for chunk in self.corpus.order(self.seed, epoch)[self.stream :: self.num_streams]:
            if sum(other.end - other.begin for other in windows[-1]) >= self.config.shuffle_bytes:
                windows.append([])
            windows[-1].append(chunk)
        return windows

    def documents(self, epoch: int, window: list[Chunk]) -> list[Document]:
        """The documents of one window, in order."""
        found = [document for chunk in window for document in self.corpus.documents(chunk)]
        return sorted(found, key=lambda d: digest("document", self.seed, epoch, d.file, d.offset))

    def _pairs(self, position: Position) -> Iterator[Pairs]:
        """The documents from a position on, forever; `self._place` follows."""
        epoch, first_window, first_document, first_pair = position
        empty = 0
        while empty < EMPTY_EPOCHS:
            empty += 1
            for w, window in enumerate(self.windows(epoch)):
                if w < first_window:
                    continue
                documents = self.documents(epoch, window)
                if documents:
                    empty = 0
                tokens = self.tokenize(document.text for document in documents[first_document:])
                for d, ids in enumerate(tokens, start=first_document):
                    self._place = (epoch, w, d)
                    yield make_pairs(ids, self.eos_id, documents[d].ends, first_pair)
                    first_pair = 0
                first_document = 0
            epoch, first_window = epoch + 1, 0
        raise InputError(
            f"data.corpus has no document for stream {self.stream} of data.num_streams = {self.num_streams}; "
            "lower data.num_streams (and train.batch_size), or give more text"
        )
