"""Processes that tokenize: `python -m data.tokenizer.workers FOLDER` reads texts on standard input and writes tokens.

They import no JAX, and end with their parent, whose end closes their input. Each is owned by one thread of a pool, so
results come in the order of the texts for any number of processes. Texts go to them in batches, so that short ones do
not each cost a trip through the pipes; long ones go in parts, which the processes share.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.tokenizer.folder import load_tokenizer

# The number of contents, and the bytes of their lengths (int64) and of themselves, which follow.
HEAD = struct.Struct("<qq")
# Characters of a batch: about 8 ms of work, of which the trip is a hundredth.
BATCH = 2**15


class TextPart(NamedTuple):
    """A text, or one of its `Tokenizer.parts`, with a flag for the last part."""

    text: str
    is_last: bool


class Workers:
    """A pool of processes with the tokenizer of a folder.

    Raises:
        InputError: the folder holds no tokenizer.
    """

    def __init__(self, folder: Path, number: int):
        self._tokenizer = load_tokenizer(folder)
        self._number = number
        self._alive = 0  # iterators
        self._own = threading.local()
        self._processes: list[subprocess.Popen] = []
        self._pool = ThreadPoolExecutor(number, initializer=self._start, thread_name_prefix="tokenize")

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "data.tokenizer.workers", str(self._tokenizer.folder)]
        # NumPy's own threads have nothing to do, and starting them takes longer than all the rest.
        environment = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._own.process = process
        self._processes.append(process)

    def _encode(self, parts: Sequence[TextPart]) -> list[tuple[np.ndarray, bool]]:
        """Encodes a batch in a process of the pool; runs in a thread."""
        process = self._own.process
        found = None
        with suppress(BrokenPipeError):
            send(process.stdin, [part.text.encode() for part in parts])
            found = receive(process.stdout)
        if found is None:
            raise RuntimeError(f"a tokenizing process ended with status {process.wait()}")
        return [(np.frombuffer(ids, np.int32), part.is_last) for ids, part in zip(found, parts, strict=True)]

    def _batches(self, texts: Iterable[str]) -> Iterator[list[TextPart]]:
        batch: list[TextPart] = []
        size = 0
        for text in texts:
            left = len(text)
            for part in self._tokenizer.parts(text) if left > BATCH else [text]:
                left -= len(part)
                batch.append(TextPart(part, is_last=not left))
                size += len(part) + 1  # there may be many empty texts
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def __call__(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the tokens of each text in order, int32 [n], possibly read-only.

        Texts are taken up to 2 + ⌈number of processes / number of iterators⌉ batches ahead. Any number of iterators
        may be alive at the same time. One that is closed early leaves no work behind.

        Raises:
            RuntimeError: a process ended.
            ValueError: a text has lone surrogates.
        """
        batches = self._batches(texts)
        under_way: deque[Future[list[tuple[np.ndarray, bool]]]] = deque()
        parts: list[np.ndarray] = []
        self._alive += 1
        try:
            while True:
                # One that is wanted, one that waits, and the iterator's share of what keeps the processes busy.
                ahead = 2 + -(-self._number // self._alive)
                more = islice(batches, max(0, ahead - len(under_way)))
                under_way.extend(self._pool.submit(self._encode, batch) for batch in more)
                if not under_way:
                    return
                for ids, is_last in under_way.popleft().result():
                    parts.append(ids)
                    if is_last:
                        yield parts[0] if len(parts) == 1 else np.concatenate(parts)
                        parts = []
        finally:
            self._alive -= 1
            for future in under_way:
                future.cancel()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(BrokenPipeError):  # it ended before
                process.stdin.close()  # type: ignore[union-attr]
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def send(pipe: BinaryIO, contents: Sequence[bytes]) -> None:
    """Writes a message for `receive`."""
    lengths = np.array([len(content) for content in contents], np.int64)
    body = b"".join([lengths.tobytes(), *contents])
    pipe.write(HEAD.pack(len(contents), len(body)) + body)
    pipe.flush()


def receive(pipe: BinaryIO) -> list[bytes] | None:
    """Reads a message of `send`, or returns None at the end of the pipe."""
    head = pipe.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    number, size = HEAD.unpack(head)
    body = pipe.read(size)
    if len(body) < size:
        return None
    lengths = np.frombuffer(body, np.int64, number)
    begin = lengths.nbytes
    ends = (begin + np.cumsum(lengths)).tolist()
    return [body[start:end] for start, end in pairwise([begin, *ends])]


def serve(folder: Path) -> None:
    """Tokenizes standard input until it closes; signals, which reach all processes, are left to the parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    tokenizer = load_tokenizer(folder)
    while (texts := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, [tokenizer.encode(text.decode()).tobytes() for text in texts])


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
