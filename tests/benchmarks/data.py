"""The data path: its speed beside raw SentencePiece and Grain, and what resuming, memory and starting cost.

    python -m tests.benchmarks.data [--gigabytes=2] [--to=FOLDER]

It needs Linux and `pip install -e '.[peers]'`, takes less than ten minutes on two cores, and writes twice `--gigabytes`
of text. The last line is one JSON object.

Speed is taken in rounds, in each of which all sides encode the same documents; ratios are within a round. Counted are
text tokens alone, once all has started: about one epoch, so that reading is in it. There are two kinds of documents:
the standard library's files, and short ones of its paragraphs. The time that SentencePiece needs for a character grows
with the length of a text, so the raw encoding of whole files is slower than that of short documents; the loader, which
encodes long texts in parts, gains on files what it does not gain on short ones. Raw is `Encode` of a list of texts in
memory to lists of Python ints, on as many threads as there are workers and at least one (`ratio_to_sentencepiece`);
`EncodeAsNumpy` of that list, to arrays, is the faster raw way, and is shown beside it.

Grain's rows are the same arrays of the same tokens (`check_equal_work`), by ConcatThenSplit from lines of the same
file, and on the same device. What differs: it is given where each line begins, which takes a pass over the file before;
documents are shuffled in all of the file, not in windows; nothing is held out; a worker makes whole batches, and their
order follows the number of workers. It reads without threads of its own, and without workers a thread makes batches
ahead, as the loader's does; with its default of 16 reading threads it is much slower here.

Memory is the growth of the highest resident size of a process of its own, over the size before the corpus is opened.
All files have just been written, so they are read from memory: the seconds are the processor's.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import grain.experimental
import jax
import numpy as np
import psutil
import sentencepiece
from absl import flags

from data.config import DataConfig
from data.files.ranges import READ_TOTALS
from data.formats.stdlib import snapshot_stdlib
from data.loader import Loader
from data.mixture import Mixture, initial_positions, open_mixture
from data.segmenter import make_pairs, segment_documents
from data.stream import StreamPosition, WindowReader, WindowStart
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import ESCAPES, MODEL_FILE, Tokenizer
from data.tokenizer.training import train_tokenizer

ROUNDS, WARM_UP = 5, 8
WORKERS = (0, 1, 2)
# Rows of a batch, each of a stream of its own, and their length.
B, T = 16, 2048
CONFIG = DataConfig(segment_length=T, num_streams=B)
VOCAB_SIZE, SAMPLE_CHARACTERS = 4096, 2**23
# Of a short document on average, and the characters of one at most.
PARAGRAPHS, LONGEST_PARAGRAPH = 10, 2000
FILES = 10_000
SHARES = {"1%": 0.01, "50%": 0.5, "99%": 0.99}
# Where the memory is measured: as many batches from each of so many places.
PLACES, BATCHES = 4, 50


class Speed(NamedTuple):
    """Of one side in one round: tokens a second, and processor seconds a million tokens."""

    rate: float
    cpu: float


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The text


def library(folder: Path) -> list[str]:
    """The standard library's files, without those few that hold characters that the tokenizer escapes."""
    snapshot_stdlib(folder / "stdlib.jsonl")
    with (folder / "stdlib.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [text for text in texts if text and not any(plain in text for plain in ESCAPES)]


def write_files(path: Path, texts: Sequence[str], size: int) -> None:
    """The library's files, and again with their paragraphs turned round by ever more, up to a size in bytes."""
    with path.open("wb") as out:
        for turn in itertools.count():
            for text in texts:
                paragraphs = text.split("\n\n")
                at = turn % len(paragraphs)
                turned = "\n\n".join(paragraphs[at:] + paragraphs[:at])
                out.write(json.dumps({"text": turned}, ensure_ascii=False).encode() + b"\n")
                if out.tell() >= size:
                    return


class Paragraphs:
    """Makes documents of random paragraphs of the library, the same in each run."""

    def __init__(self, texts: Sequence[str]):
        found = sorted({paragraph for text in texts for paragraph in text.split("\n\n")})
        short = [paragraph for paragraph in found if 0 < len(paragraph) <= LONGEST_PARAGRAPH]
        self._escaped = [json.dumps(paragraph, ensure_ascii=False)[1:-1].encode() for paragraph in short]
        self._random = random.Random(0)

    def text(self, number: int) -> bytes:
        """So many paragraphs, escaped for JSON."""
        return b"\\n\\n".join(self._random.choices(self._escaped, k=number))

    def write(self, path: Path, size: int, documents: int | None = None) -> None:
        """Short documents, or as many as are wanted, of `size` bytes in all."""
        with path.open("wb") as out:
            for end in [size] if documents is None else [size * (i + 1) // documents for i in range(documents)]:
                out.write(b'{"text": "' + self.text(1))
                while out.tell() < end:
                    if documents is None:
                        out.write(b'"}\n{"text": "' + self.text(1 + int(self._random.expovariate(1 / PARAGRAPHS))))
                    else:
                        out.write(b"\\n\\n" + self.text(PARAGRAPHS))
                out.write(b'"}\n')


# The loader


def opened(corpus: Path, **changes: Any) -> tuple[Mixture, DataConfig]:
    config = dataclasses.replace(CONFIG, corpus=str(corpus), **changes)
    return open_mixture(config, lambda: ""), config


def on_cpu() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def open_loader(mixture: Mixture, config: DataConfig, tokenizer: Tokenizer, positions: np.ndarray | None) -> Loader:
    return Loader(mixture, tokenizer, config, 0, itertools.repeat(B), on_cpu(), positions)


class First(NamedTuple):
    """The first batch of a loader, and what it took to get it."""

    tokens: np.ndarray
    seconds: float
    read: int


def first_batch(corpus: Path, tokenizer: Tokenizer, positions: np.ndarray | None = None) -> First:
    """Open a corpus and read from positions on."""
    read, start = READ_TOTALS["bytes"], time.perf_counter()
    with open_loader(*opened(corpus), tokenizer, positions) as batches:
        tokens = np.asarray(next(batches).batch["tokens"])
        return First(tokens, time.perf_counter() - start, READ_TOTALS["bytes"] - read)


def positions_at(mixture: Mixture, config: DataConfig, share: float) -> np.ndarray:
    """Where all streams have read about this share of their first epoch: at the beginning of the window there."""
    corpus, positions = mixture.sources[0].corpus, initial_positions(mixture, B)
    assert not corpus.shared
    chunk_bytes = max(chunk.end - chunk.begin for chunk in corpus.chunks)
    for v in range(B):
        there = WindowStart(0, int(share * len(corpus.order(0, 0)[v::B])))
        # As windows begin where the one before ends, so that one is read from a chunk's beginning.
        start = WindowStart(0, max(0, there.chunk - 2 * config.shuffle_window // chunk_bytes))
        reader = WindowReader(corpus, config, 0, {v: start})
        while (following := reader.take(v, start).next) <= there:
            start = following
        positions[v, 0, :-1] = StreamPosition(*start)
    return positions


# Grain


class Lines:
    """A source for Grain: the lines of a file."""

    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as lines:
            self._ends = np.cumsum([len(line) for line in lines])
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> bytes:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDONLY)
        begin = int(self._ends[i - 1]) if i else 0
        return os.pread(self._file, int(self._ends[i]) - begin, begin)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


class ToPairs:
    """A line's document → its inputs and targets, side by side, so that Grain packs them as one."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._tokenizer: Tokenizer | None = None

    def __call__(self, line: bytes) -> dict[str, np.ndarray]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        ids = self._tokenizer.encode(json.loads(line)["text"])
        pairs = np.full((len(ids) + 1, 2), self._tokenizer.eos_id, np.int32)
        pairs[1:, 0] = pairs[:-1, 1] = ids
        return {"pairs": pairs}

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_tokenizer": None}


def to_row(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "tokens": packed["pairs"][:, 0],
        "targets": packed["pairs"][:, 1],
        "positions": packed["pairs_positions"],
        "segment_ids": packed["pairs_segment_ids"],
        "loss_weights": (packed["pairs_segment_ids"] > 0).astype(np.float32),
    }


def grain_rows(documents: grain.MapDataset, tokenizer: Tokenizer) -> grain.IterDataset:
    """Rows of lines, in the order of the lines."""
    pairs = documents.map(ToPairs(tokenizer.folder)).to_iter_dataset(grain.ReadOptions(0, 0))
    return grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct={"pairs": T}).map(to_row)


@contextlib.contextmanager
def grain_batches(lines: Lines, tokenizer: Tokenizer, workers: int) -> Iterator[Iterator[Any]]:
    """Batches of shuffled lines without end, on a device."""
    made = grain_rows(grain.MapDataset.source(lines).seed(0).shuffle().repeat(), tokenizer).batch(B)
    if workers:
        made = made.mp_prefetch(grain.MultiprocessingOptions(workers, CONFIG.prefetch))
    else:
        made = grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=CONFIG.prefetch)
    batches, sharding = iter(made), on_cpu()
    try:
        yield (jax.device_put(batch, sharding) for batch in batches)
    finally:
        batches.close()


@contextlib.contextmanager
def loader_batches(corpus: Path, documents: int, tokenizer: Tokenizer, workers: int) -> Iterator[Iterator[Any]]:
    """The same of the loader.

    Each stream's part of the corpus fits a window. As in the middle of a run, the streams begin at different places of
    theirs; else none or all of them would come to their ends while they are timed.
    """
    mixture, config = opened(corpus, num_workers=workers)
    positions = initial_positions(mixture, B)
    positions[:, 0, StreamPosition._fields.index("item")] = np.arange(B) * documents // B**2
    with open_loader(mixture, config, tokenizer, positions) as batches:
        yield (loaded.batch for loaded in batches)


def check_equal_work(corpus: Path, texts: Sequence[str], tokenizer: Tokenizer, raw: Any) -> None:
    """Raw ids, ours and those in Grain's rows are the same, and its rows are ours, for documents in the same order."""
    ids = [tokenizer.encode(text) for text in texts]
    assert [found.tolist() for found in ids] == raw.Encode(list(texts), num_threads=1)
    ours = list(segment_documents([make_pairs(found, tokenizer.bos_ids, tokenizer.eos_id) for found in ids], CONFIG))
    theirs = list(grain_rows(grain.MapDataset.source(Lines(corpus))[: len(texts)], tokenizer))
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name, array in row.items():
            np.testing.assert_array_equal(array, other[name])
            assert array.dtype == other[name].dtype


# Speed


def cpu_seconds() -> float:
    """Of this process and its children so far."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(found.user + found.system for found in times)


def timed(work: Callable[[], Any], tokens: float) -> Speed:
    cpu, start = cpu_seconds(), time.perf_counter()
    work()
    return Speed(tokens / (time.perf_counter() - start), (cpu_seconds() - cpu) / tokens * 1e6)


def timed_batches(opening: contextlib.AbstractContextManager, count: int, tokens: float) -> Speed:
    """Of so many batches, once the first ones have come."""
    with opening as batches:
        for _ in range(WARM_UP):
            next(batches)

        def work() -> None:
            for batch in itertools.islice(batches, count):
                jax.block_until_ready(batch)
            assert batch["loss_weights"].shape == (B, T)
            assert batch["loss_weights"].all()

        return timed(work, tokens)


def speed(corpus: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Rounds of all sides over a corpus: prints a table, returns figures."""
    with corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE))
    check_equal_work(corpus, texts[:200], tokenizer, raw)
    tokens, lines = sum(map(len, raw.EncodeAsNumpy(texts, num_threads=2))), Lines(corpus)
    count = max(1, round(tokens / (B * T)))
    # Of the pairs, one for each document is of its end.
    in_batches = count * B * T * tokens / (tokens + len(texts))
    sides: dict[str, Callable[[], Speed]] = {}
    for w in WORKERS:
        if w != 1:
            threads = max(w, 1)
            sides[f"lists, threads: {threads}"] = lambda n=threads: timed(
                lambda: raw.Encode(texts, num_threads=n), tokens
            )
            sides[f"arrays, threads: {threads}"] = lambda n=threads: timed(
                lambda: raw.EncodeAsNumpy(texts, num_threads=n), tokens
            )
        sides[f"loader, workers: {w}"] = lambda w=w: timed_batches(
            loader_batches(corpus, len(texts), tokenizer, w), count, in_batches
        )
        sides[f"grain, workers: {w}"] = lambda w=w: timed_batches(grain_batches(lines, tokenizer, w), count, in_batches)
    rounds: list[dict[str, Speed]] = []
    for r in range(ROUNDS):
        say(f"{corpus.stem}: round {r + 1} of {ROUNDS}")
        rounds.append({side: sides[side]() for side in (reversed(sides) if r % 2 else sides)})

    def ratio(side: str, other: str) -> float:
        return statistics.median(found[side].rate / found[other].rate for found in rounds)

    print(f"\n{corpus.stem}: {len(texts):,} documents of {tokens / len(texts):,.0f} tokens; medians of {ROUNDS} rounds")
    print(f"{'':22}   tokens/s   CPU s/M tokens   tokens/s of raw lists   of raw arrays")
    cpu = {side: statistics.median(found[side].cpu for found in rounds) for side in sides}
    for side in sides:
        threads, rate = 2 if side.endswith("2") else 1, statistics.median(found[side].rate for found in rounds)
        of_lists, of_arrays = (ratio(side, f"{kind}, threads: {threads}") for kind in ("lists", "arrays"))
        print(f"{side:22} {rate:10,.0f} {cpu[side]:16.3f} {of_lists:23.2f} {of_arrays:15.2f}")
    figures: dict[str, Any] = {}
    for w in WORKERS:
        figures[f"ratio_to_sentencepiece_{w}_workers"] = ratio(f"loader, workers: {w}", f"lists, threads: {max(w, 1)}")
        figures[f"ratio_to_fastest_raw_{w}_workers"] = ratio(f"loader, workers: {w}", f"arrays, threads: {max(w, 1)}")
        figures[f"ratio_to_grain_{w}_workers"] = ratio(f"loader, workers: {w}", f"grain, workers: {w}")
    return figures | {"cpu_seconds_per_million_tokens": cpu}


# Resuming, memory and starting


def resume(corpus: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is read to go on at places of an epoch."""
    mixture, config = opened(corpus)
    size, window = mixture.sources[0].corpus.size, config.shuffle_window * B
    print(f"\nresuming in one file of {size / 1e6:,.1f} MB; a window of each stream: {window / 1e6:,.1f} MB")
    figures = {}
    for name, share in SHARES.items():
        say(f"resuming at {name}")
        with open_loader(mixture, config, tokenizer, positions_at(mixture, config, share)) as batches:
            *_, last, following = itertools.islice(batches, 4)
        found = first_batch(corpus, tokenizer, last.positions)
        np.testing.assert_array_equal(found.tokens, following.batch["tokens"])
        figures[name] = found.read
        print(f"at {name:>3}: {found.read / 1e6:8,.1f} MB read, {found.seconds:6.2f} s to the first batch")
    return {"resume_bytes": figures, "window_bytes": window, "corpus_bytes": size}


def kilobytes(name: str) -> int:
    """A line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def growth(corpus: Path, tokenizer_folder: Path, num_streams: int, places: int) -> float:
    """MB by which this process grows while it reads `PLACES` × `BATCHES` batches from so many places of a corpus."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.encode("a" * 2**16)
    jax.block_until_ready(jax.device_put(np.zeros((B, T)), on_cpu()))
    Path("/proc/self/clear_refs").write_text("5")  # the highest size is now the present one
    before = kilobytes("VmRSS")
    mixture, config = opened(corpus, num_streams=num_streams, validation_fraction=0.0)
    for place in range(places):
        positions = positions_at(mixture, config, place / places) if place else None
        with open_loader(mixture, config, tokenizer, positions) as batches:
            for loaded in itertools.islice(batches, PLACES * BATCHES // places):
                jax.block_until_ready(loaded.batch)
    return (kilobytes("VmHWM") - before) / 1e3


def memory(corpora: dict[str, Path], document: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Growth for corpora of several sizes, and for a document that is one long line."""
    asked: dict[str, tuple[Path, int, int]] = {name: (corpus, B, PLACES) for name, corpus in corpora.items()}
    asked[f"one document of {document.stat().st_size / 1e6:,.0f} MB"] = (document, 1, 1)
    print(f"\ngrowth of a process that reads {PLACES * BATCHES} batches, from {PLACES} places of a corpus")
    figures = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for name, (corpus, num_streams, places) in asked.items():
            say(f"memory: {name}")
            figures[name] = pool.submit(growth, corpus, tokenizer.folder, num_streams, places).result()
            print(f"{name:26} {figures[name]:8,.0f} MB")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the largest corpus [2]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the files go [a temporary folder]")
    arguments = parser.parse_args()
    size = round(arguments.gigabytes * 1e9)
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask for them
    with contextlib.ExitStack() as stack:
        folder = arguments.to or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        texts, sample, characters = library(folder), [], 0
        for text in random.Random(0).sample(texts, len(texts)):
            if characters < SAMPLE_CHARACTERS:
                sample.append(text)
                characters += len(text)
        say("training the tokenizer")
        tokenizer = train_tokenizer(sample, VOCAB_SIZE, folder / "tokenizer")

        paragraphs, of_speed = Paragraphs(texts), min(size // 160, 2**24)
        write_files(folder / "files.jsonl", texts, of_speed)
        paragraphs.write(folder / "short_documents.jsonl", of_speed)
        figures = speed(folder / "files.jsonl", tokenizer)
        figures["short_documents"] = speed(folder / "short_documents.jsonl", tokenizer)

        corpora = {f"{size * part / 1e9:g} GB": (size * part, folder / f"{part}.jsonl") for part in (1 / 8, 1 / 2, 1)}
        for name, (wanted, path) in corpora.items():
            say(f"writing {name}")
            paragraphs.write(path, int(wanted))
        paragraphs.write(folder / "document.jsonl", size // 10, documents=1)
        figures |= resume(folder / "1.jsonl", tokenizer)
        of_memory = {name: path for name, (_, path) in corpora.items()}
        figures["memory_growth_mb"] = memory(of_memory, folder / "document.jsonl", tokenizer)

        say(f"writing {FILES:,} files")
        (folder / "many").mkdir(exist_ok=True)
        for i in range(FILES):
            paragraphs.write(folder / "many" / f"{i:05}.jsonl", size // 10 // FILES)
        start = first_batch(folder / "many", tokenizer)
        figures |= {"startup_seconds": start.seconds, "startup_bytes": start.read}
        print(f"\n{FILES:,} files: {start.seconds:.2f} s and {start.read / 1e6:,.1f} MB read to the first batch")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
