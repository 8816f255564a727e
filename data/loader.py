"""Streams to global batches: each process reads the streams of its own rows, a little ahead of the devices."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.config import DataConfig
from data.corpus import Corpus
from data.segmenter import Row
from data.stream import Stream
from data.tokenizer import Tokenizer
from data.workers import Workers

Batch = dict[str, jax.Array]


class Loader:
    """A context manager and iterator of (batch, positions after it), as long as there are batch sizes.

    A batch holds the arrays of a row stacked to [B, T] over all devices. Row b belongs to stream ⌊b·V/B⌋. Positions are
    int32 [V, 4], −1 in the streams that other processes read: see `gather_positions`.

    Args:
        corpus: the text.
        tokenizer: of the run.
        config: of the data.
        seed: of the order.
        batch_sizes: B of each batch.
        num_streams: V; divides each B, and is divided by the number of shards of a batch.
        sharding: of the batch's arrays.
        positions: of all streams, [V, 4]; none: the beginning.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        config: DataConfig,
        seed: int,
        batch_sizes: Iterator[int],
        num_streams: int,
        sharding: jax.sharding.Sharding,
        positions: np.ndarray | None = None,
    ):
        self._batch_sizes, self._length, self._sharding = batch_sizes, config.segment_length, sharding
        self._workers = Workers(tokenizer.folder, config.num_workers) if config.num_workers else None
        tokenize = self._workers or (lambda texts: map(tokenizer.encode, texts))
        begin = np.zeros((num_streams, 4), np.int32) if positions is None else positions
        # Shards are cut between streams, so those of a batch with one row a stream are those of every batch.
        shards = sharding.addressable_devices_indices_map((num_streams, self._length)).values()
        self._streams = {
            v: Stream(corpus, tokenize, tokenizer.eos_id, config, seed, v, num_streams, tuple(begin[v].tolist()))
            for v in sorted({v for shard in shards if shard for v in range(num_streams)[shard[0]]})
        }
        self._num_streams = num_streams
        self._ready: queue.Queue[tuple[Batch, np.ndarray] | BaseException] = queue.Queue(config.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._workers:
            self._workers.close()

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        return self

    def __next__(self) -> tuple[Batch, np.ndarray]:
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _fill(self) -> None:
        """The thread: batches into the queue, until it is stopped or fails."""
        while not self._stop.is_set():
            made: tuple[Batch, np.ndarray] | BaseException
            try:
                made = self._next_batch()
            except BaseException as error:  # raised again where the batch is asked for
                made = error
            while not self._stop.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return

    def _next_batch(self) -> tuple[Batch, np.ndarray]:
        shape = (next(self._batch_sizes), self._length)
        rows_per_stream = shape[0] // self._num_streams
        rows: dict[int, Row] = {}
        positions = np.full((self._num_streams, 4), -1, np.int32)
        for v, stream in self._streams.items():
            for i in range(rows_per_stream):
                rows[v * rows_per_stream + i], positions[v] = next(stream)

        def array(name: str) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return np.stack([rows[b][name] for b in range(shape[0])[index[0]]])[:, index[1]]

            return jax.make_array_from_callback(shape, self._sharding, shard)

        return {name: array(name) for name in next(iter(rows.values()))}, positions


def gather_positions(positions: np.ndarray) -> np.ndarray:
    """Positions of all streams [V, 4] from each process's own; all processes call it together."""
    if jax.process_count() == 1:
        return positions
    return np.asarray(multihost_utils.process_allgather(positions)).max(axis=0)
