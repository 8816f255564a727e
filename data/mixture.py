"""Several corpora as one: the choice of the corpus of each row.

Each stream keeps a credit for each corpus. With each row, the credits grow by the corpora's shares of the step; the
corpus with the largest credit (the first of equals) gives the row and pays 1 for it. After any number of rows a stream
has therefore drawn each of K corpora less than K − 1 rows more or fewer than its shares, and less than 1 for two
corpora. Streams begin at different places of that sequence, so that a rare corpus comes to them at different times.

A position is a `StreamPosition` for each corpus, and the credit of the corpus.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.config import NO_CORPUS, ResolvedDataConfig, stages, weight_at
from data.corpus import Corpus, open_corpus
from data.errors import InputError
from data.infilling import open_infillings
from data.segmenter import SegmentPart
from data.stream import Rows, Stream, StreamPosition, Tokenize, open_readers
from data.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from data.formats.template import ChatTemplate

# Credits are integers, so that they are the same on every machine; a row costs this many.
CREDITS_PER_ROW = 2**32
# Largest number of rows of the sequence by which the starts of streams are staggered.
STAGGERED_ROWS = 2**16
# Number of integers in a position, for each corpus of a stream.
POSITION_SIZE = len(StreamPosition._fields) + 1


@dataclass(frozen=True)
class Source:
    """A corpus of a mixture.

    Attributes:
        name: name of the corpus, or an empty text if it is the only one.
        config: settings of the data, with the corpus's own fields.
        weights: stages (first step, weight), in order from step 0.
    """

    name: str
    corpus: Corpus
    config: ResolvedDataConfig
    weights: tuple[tuple[int, float], ...]

    def weight(self, step: int) -> float:
        """Returns the weight at a step."""
        return weight_at(step, self.weights)


class Mixture:
    """The corpora of a run. Made by `open_mixture`.

    Attributes:
        sources: the corpora, at least one.
        is_bounded: true if some corpus has a number of epochs; the run ends when one has ended in all streams.
        template: writes conversations as texts, if there are any.
    """

    def __init__(self, sources: Sequence[Source], template: "ChatTemplate | None" = None):
        self.sources, self.template = list(sources), template
        self.is_bounded = any(source.config.epochs is not None for source in sources)

    def shares(self, step: int) -> list[int]:
        """Returns the growth of each corpus's credit with a row of a step; they sum to `CREDITS_PER_ROW`."""
        return shares_of([source.weight(step) for source in self.sources])

    def fingerprints(self) -> dict[str, str]:
        """Returns the fingerprint of each corpus by its name in messages, and that of the template."""
        corpora = {corpus_field(source.name): source.corpus.fingerprint for source in self.sources}
        return corpora | ({"data.chat_template": self.template.fingerprint} if self.template else {})

    @property
    def skipped(self) -> int:
        """The number of unreadable documents that this process has skipped so far."""
        return sum(len(source.corpus.skipped) for source in self.sources)


def shares_of(weights: Sequence[float]) -> list[int]:
    """Returns shares in proportion to weights; they sum to `CREDITS_PER_ROW`."""
    shares = [round(CREDITS_PER_ROW * weight / sum(weights)) for weight in weights]
    shares[shares.index(max(shares))] += CREDITS_PER_ROW - sum(shares)
    return shares


def corpus_field(name: str) -> str:
    """Returns the name of a corpus in messages."""
    return f"data.corpus[{name!r}]" if name else "data.corpus"


def open_mixture(
    config: ResolvedDataConfig,
    stdlib: Callable[[], str],
    leave_out: Path | None = None,
    template: "ChatTemplate | None" = None,
) -> Mixture:
    """Opens every corpus of `data.corpus`.

    Args:
        stdlib: returns the path of the default corpus when it is used.
        leave_out: a folder whose files are ignored (the run's own).
        template: writes conversations as texts (see `data.conversations.open_template`).

    Raises:
        InputError: as `open_corpus`, for all corpora at once; or no corpus is named.
    """
    if config.corpus is None:
        raise InputError(NO_CORPUS)
    several = config.corpus if isinstance(config.corpus, Mapping) else {"": {"corpus": config.corpus}}
    sources, problems = [], []
    # Sorted by name, because a config file and a JSON text may order them differently.
    for name, values in sorted(several.items()):
        own = {field: value for field, value in values.items() if field != "weight"}
        of_source = dataclasses.replace(config, **own)
        path = stdlib() if values["corpus"] == "stdlib" else values["corpus"]
        try:
            corpus = open_corpus(path, of_source, leave_out, corpus_field(name), template)
            sources.append(Source(name, corpus, of_source, tuple(stages(values.get("weight", 1)))))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return Mixture(sources, template)


def choose_corpus(credits: list[int], shares: Sequence[int]) -> int:
    """Returns the corpus of the next row, and updates `credits`."""
    for k, share in enumerate(shares):
        credits[k] += share
    # A corpus without a share is never drawn, whatever its credit.
    chosen = max((k for k, share in enumerate(shares) if share), key=lambda k: (credits[k], -k))
    credits[chosen] -= CREDITS_PER_ROW
    return chosen


def initial_positions(mixture: Mixture, num_streams: int, epoch: int = 0) -> np.ndarray:
    """Returns the first position of all streams, int64 [V, K, `POSITION_SIZE`]."""
    shares = mixture.shares(0)
    positions = np.zeros((num_streams, len(shares), POSITION_SIZE), np.int64)
    positions[:, :, 0] = epoch
    rows = min(-(-CREDITS_PER_ROW // min(filter(None, shares))), STAGGERED_ROWS)
    credits, done = [0] * len(shares), 0
    for v in range(num_streams):
        while done < v * rows // num_streams:
            choose_corpus(credits, shares)
            done += 1
        positions[v, :, -1] = credits
    return positions


class MixedStream:
    """One of V virtual readers of all corpora.

    Attributes:
        ended: one flag per corpus, true if the corpus has ended in this stream.
    """

    def __init__(self, mixture: Mixture, streams: Sequence[Rows], positions: np.ndarray):
        self._mixture, self._streams = mixture, streams
        self._positions = positions[:, :-1].copy()
        self._credits = positions[:, -1].tolist()
        epochs = [source.config.epochs for source in mixture.sources]
        self.ended = [n is not None and self._positions[k, 0] >= n for k, n in enumerate(epochs)]

    @property
    def positions(self) -> np.ndarray:
        """Returns the position of its next row, int64 [K, `POSITION_SIZE`]."""
        return np.column_stack([self._positions, self._credits])

    def take(self, step: int) -> tuple[int, list[SegmentPart]]:
        """Returns (corpus, parts) of the next row for a step; without parts if that corpus has ended."""
        k = choose_corpus(self._credits, self._mixture.shares(step))
        row = next(self._streams[k], None)
        if row is None:
            self.ended[k] = True
            self._positions[k] = StreamPosition(epoch=self._mixture.sources[k].config.epochs or 0)
            return k, []
        parts, self._positions[k] = row
        return k, parts


def open_streams(
    mixture: Mixture,
    tokenizer: Tokenizer,
    tokenize: Tokenize,
    seed: int,
    streams: Sequence[int],
    positions: np.ndarray,
) -> dict[int, MixedStream]:
    """Opens the streams with some indices, from positions [V, K, `POSITION_SIZE`] on.

    Raises InputError if documents are to be filled in the middle, and the tokenizer has no marks for it.
    """
    rows: dict[int, list[Rows]] = {v: [] for v in streams}
    infillings = open_infillings([source.config for source in mixture.sources], tokenizer, seed)
    bos_ids, eos_id = tokenizer.bos_ids, tokenizer.eos_id
    for k, (source, infilling) in enumerate(zip(mixture.sources, infillings, strict=True)):
        starts = {v: StreamPosition(*positions[v, k, :-1].tolist()) for v in streams}
        for v, reader in open_readers(source.corpus, source.config, seed, starts).items():
            stream = Stream(reader, tokenize, bos_ids, eos_id, source.config, v, infilling, tokenizer.encode_marked)
            rows[v].append(stream.rows(starts[v]))
    return {v: MixedStream(mixture, rows[v], positions[v]) for v in streams}
