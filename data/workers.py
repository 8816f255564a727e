"""Processes that tokenize: `python -m data.workers FOLDER` reads texts on standard input, writes their tokens.

They import no JAX and end with their parent, whose end closes their input. Each is owned by one thread of a pool, so
results come in the order of the texts, whatever the number of processes.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.tokenizer import Tokenizer

LENGTH = struct.Struct("<q")
# Texts of a stream that are being tokenized ahead of the one that is wanted.
AHEAD = 2


class Workers:
    """A number of processes with the tokenizer of a folder."""

    def __init__(self, folder: Path, number: int):
        self._folder = folder
        self._own = threading.local()
        self._processes: list[subprocess.Popen] = []
        self._pool = ThreadPoolExecutor(number, initializer=self._start, thread_name_prefix="tokenize")

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "data.workers", str(self._folder)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
        )
        self._own.process = process
        self._processes.append(process)

    def _encode(self, text: str) -> np.ndarray:
        process = self._own.process
        send(process.stdin, text.encode())
        found = receive(process.stdout)
        if found is None:
            raise RuntimeError(f"a tokenizing process ended with status {process.wait()}")
        return np.frombuffer(found, np.int32)

    def __call__(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Tokens of each text, in order; a few texts ahead are under way."""
        texts = iter(texts)
        under_way: deque[Future[np.ndarray]] = deque(self._pool.submit(self._encode, t) for t in islice(texts, AHEAD))
        while under_way:
            tokens = under_way.popleft().result()
            under_way.extend(self._pool.submit(self._encode, text) for text in islice(texts, 1))
            yield tokens

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def send(pipe: BinaryIO, content: bytes) -> None:
    """Write bytes with their length before them."""
    pipe.write(LENGTH.pack(len(content)) + content)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes | None:
    """The inverse of `send`; none at the end."""
    head = pipe.read(LENGTH.size)
    return pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def serve(folder: Path) -> None:
    """Tokenize what comes on standard input until it closes; Ctrl-C, which reaches all processes, is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = Tokenizer.load(folder)
    while (text := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, tokenizer.encode(text.decode()).tobytes())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
