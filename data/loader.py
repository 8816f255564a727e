"""Streams to global batches: each process reads the streams of its own rows, slightly ahead of the devices."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.config import ResolvedDataConfig
from data.mixture import POSITION_SIZE, Mixture, initial_positions, open_streams
from data.provenance import describe_row
from data.segmenter import Segment, SegmentPart, make_segment
from data.tokenizer.threads import TokenizingThreads
from data.tokenizer.tokenizer import Tokenizer

# Fills the positions that only another process knows.
UNREAD = np.iinfo(np.int64).min


class LoadedBatch(NamedTuple):
    """A global batch.

    Attributes:
        batch: arrays [B, T] over all devices; row b belongs to stream ⌊b·V/B⌋.
        positions: position of each stream's next row, int64 [V, K, `POSITION_SIZE`], with `UNREAD` for streams that
            other processes read (see `gather_positions`).
        streams_left_after: int64 [K], the number of this process's streams with text of each corpus for the next batch;
            a corpus without end counts in all of them (see `corpus_has_ended`).
        streams_left_in: int64 [K], the same count for this batch.
        trained: this process's number of positions that are trained on.
        skipped: the rows of this process's streams that were skipped before the batch, as `describe_row` without text,
            and with "batch", the number of the skipped batch.
        figures: numbers of the batch for its line of metrics.jsonl, if it has any.
    """

    batch: dict[str, jax.Array]
    positions: np.ndarray
    streams_left_after: np.ndarray
    streams_left_in: np.ndarray
    trained: int
    skipped: list[dict[str, Any]]
    figures: Mapping[str, Any] = MappingProxyType({})


class Loader:
    """A context manager and iterator of `LoadedBatch`, for as long as there are batch sizes.

    Args:
        config: resolved settings of the data; V divides each B and is divided by the number of shards of a batch.
        positions: positions of all streams, [V, K, `POSITION_SIZE`]; None for the beginning.
        step: number (from 0) of the first batch's step, which weights may depend on.
        skips: number of batches of the same size to read and skip before a step's own, by step.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: ResolvedDataConfig,
        seed: int,
        batch_sizes: Iterable[int],
        sharding: jax.sharding.Sharding,
        positions: np.ndarray | None = None,
        step: int = 0,
        skips: Mapping[int, int] = MappingProxyType({}),
    ):
        self._tokenizer, self._skips = tokenizer, skips
        self._mixture, self._config, self._sharding = mixture, config, sharding
        self._tokenizing = TokenizingThreads(tokenizer, config.num_workers) if config.num_workers else None
        # Shards hold whole streams, so a batch with one row for each stream has the shards of every batch.
        shards = sharding.addressable_devices_indices_map((config.num_streams, config.segment_length)).values()
        mine = sorted({v for shard in shards if shard for v in range(config.num_streams)[shard[0]]})
        begin = initial_positions(mixture, config.num_streams) if positions is None else positions
        tokenize = self._tokenizing or tokenizer.encode_all
        self._streams = open_streams(mixture, tokenizer, tokenize, seed, mine, begin)
        self._batches = self._in_order(enumerate(batch_sizes, start=step))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._pending: deque[Future[LoadedBatch]] = deque()

    def __enter__(self) -> "Loader":
        # One is made while `prefetch` are ready.
        for _ in range(self._config.prefetch + 1):
            self._prepare()
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._tokenizing:
            self._tokenizing.close()

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        loaded = self._pending.popleft().result()
        self._prepare()
        return loaded

    def _prepare(self) -> None:
        self._pending.append(self._thread.submit(next, self._batches))

    def _in_order(self, sizes: Iterable[tuple[int, int]]) -> Iterator[LoadedBatch]:
        """Yields all batches; if a corpus may end, one batch late, to know the streams left in the next."""
        batches = itertools.starmap(self._make, sizes)
        if not self._mixture.is_bounded:
            yield from batches
        for loaded, following in itertools.pairwise(batches):
            yield loaded._replace(streams_left_after=following.streams_left_after)

    def _make(self, step: int, size: int) -> LoadedBatch:
        rows, positions, left, skipped = self._read(step, size)
        shape = (size, self._config.segment_length)

        def shard(name: str, index: Any) -> np.ndarray:
            return np.stack([rows[b][name] for b in range(size)[index[0]]])[:, index[1]]

        batch: dict[str, jax.Array] = {
            name: jax.make_array_from_callback(shape, self._sharding, partial(shard, name))
            for name in next(iter(rows.values()))
        }
        trained = sum(int(np.count_nonzero(row["loss_weights"])) for row in rows.values())
        return LoadedBatch(batch, positions, left, left, trained, skipped)

    def _read(self, step: int, size: int) -> tuple[dict[int, Segment], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Returns the rows of this process's streams by their index in the batch, and the rest of `LoadedBatch`."""
        skipped = [
            {"batch": batch} | describe_row(self._mixture, self._tokenizer, b, k, parts)
            for batch in range(self._skips.get(step, 0))
            for b, (k, parts) in self._take(step, size)[0].items()
        ]
        for part in (part for row in skipped for part in row["parts"]):
            del part["text"]
        taken, positions, left = self._take(step, size)
        return {b: make_segment(parts, self._config) for b, (_, parts) in taken.items()}, positions, left, skipped

    def _take(self, step: int, size: int) -> tuple[dict[int, tuple[int, list[SegmentPart]]], np.ndarray, np.ndarray]:
        """Returns the corpus and parts of each row, positions, and streams left."""
        K, V = len(self._mixture.sources), self._config.num_streams
        each = size // V
        taken: dict[int, tuple[int, list[SegmentPart]]] = {}
        positions = np.full((V, K, POSITION_SIZE), UNREAD, np.int64)
        left = np.zeros(K, np.int64)
        for v, stream in self._streams.items():
            gave = np.zeros(K, bool)
            for b in range(v * each, (v + 1) * each):
                taken[b] = k, parts = stream.take(step)
                gave[k] |= bool(parts)
            positions[v] = stream.positions
            left += np.logical_not(stream.ended) | gave
        return taken, positions, left


def gather_positions(positions: np.ndarray) -> np.ndarray:
    """All-gathers the positions of all streams; all processes call it together."""
    # JAX has no 64-bit integers by default, so they are gathered as two halves.
    halves = multihost_utils.process_allgather(positions.view(np.int32))
    return np.ascontiguousarray(halves).view(np.int64).max(axis=0)


def look_ahead(loaded: LoadedBatch, mixture: Mixture) -> tuple[bool, bool]:
    """Returns (True if a corpus ends with this batch, True if the batch trains on nothing); all processes call it.

    A batch trains on nothing where all its rows lie within prompts, which can be longer than a row.
    """
    prompted = any(source.config.prompt_field or source.config.messages_field for source in mixture.sources)
    if not (mixture.is_bounded or prompted):
        return False, False
    own = np.append(loaded.streams_left_after, loaded.trained > 0)
    *left, trained = multihost_utils.process_allgather(own).reshape(-1, len(own)).sum(axis=0).tolist()
    return mixture.is_bounded and not all(left), not trained


def corpus_has_ended(left: np.ndarray, mixture: Mixture) -> bool:
    """True if a corpus with a number of epochs has ended in all streams; all processes call it together."""
    if not mixture.is_bounded:
        return False
    return not multihost_utils.process_allgather(left).sum(axis=0).all()
