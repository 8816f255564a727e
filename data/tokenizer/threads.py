"""Threads that tokenize ahead of the loader. Tokenizers release Python's global lock, so no processes are needed.

Results come in the order of the texts, whatever the number of threads. Texts are encoded in batches, so that short ones
don't each wait for the lock; the `Tokenizer.parts` of a long text may go to several threads.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np

from data.tokenizer.tokenizer import Tokenizer

# Characters of a batch: about 8 ms of work.
BATCH_CHARACTERS = 2**15
# Token ids of each part of a batch, and whether it is the last part of its text.
EncodedParts = list[tuple[np.ndarray, bool]]


class TokenizingThreads:
    """A pool of threads that encode texts with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, num_threads: int):
        self._tokenizer, self._num_threads = tokenizer, num_threads
        self._num_iterators = 0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    def __call__(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token ids of each text in order, int32 [n], possibly read-only.

        Texts are taken up to 2 + ⌈number of threads / number of iterators⌉ batches ahead. Any number of iterators
        may be alive at the same time. One that is closed early leaves no work behind.

        Raises:
            ValueError: a text has lone surrogates.
        """
        batches = self._batches(texts)
        pending: deque[Future[EncodedParts]] = deque()
        parts: list[np.ndarray] = []
        self._num_iterators += 1
        try:
            while True:
                # The batch to yield, the next, and this iterator's share of what keeps the threads busy.
                ahead = 2 + -(-self._num_threads // self._num_iterators)
                new_batches = islice(batches, max(0, ahead - len(pending)))
                pending.extend(self._pool.submit(self._encode, *batch) for batch in new_batches)
                if not pending:
                    return
                for ids, is_last in pending.popleft().result():
                    parts.append(ids)
                    if is_last:
                        yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                        parts = []
        finally:
            self._num_iterators -= 1
            for future in pending:
                future.cancel()

    def _batches(self, texts: Iterable[str]) -> Iterator[tuple[list[str], list[bool]]]:
        """Yields batches of parts; for each part, true if it is the last of its text."""
        parts: list[str] = []
        are_last: list[bool] = []
        size = 0
        for text in texts:
            characters_left = len(text)
            for part in self._tokenizer.parts(text):
                characters_left -= len(part)
                parts.append(part)
                are_last.append(not characters_left)
                size += len(part) + 1  # there may be many empty texts
                if size >= BATCH_CHARACTERS:
                    yield parts, are_last
                    parts, are_last, size = [], [], 0
        if parts:
            yield parts, are_last

    def _encode(self, parts: list[str], are_last: list[bool]) -> EncodedParts:
        return list(zip(self._tokenizer.encode_parts(parts), are_last, strict=True))

    def close(self) -> None:
        """Ends the threads; batches that have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)
