"""What a run says of itself: metrics.jsonl, the live display, and the share of the hardware's peak.

Model FLOPs of a token are 6 × the matrix parameters that it meets (the tied embedding counts once, as unembedding)
+ 12 × L × H × C × the keys that a position sees on average (T/2, or less with a sliding window): forward and backward,
nothing for what is recomputed (PaLM, Chowdhery et al. 2022, appendix B, halved for causality).
"""

import collections
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.live import Live
from rich.text import Text

from model.config import ModelConfig
from model.parameters import parameter_table
from train.hardware import chip_of
from train.storage import writing
from train.writers import Writer

log = logging.getLogger("ziggurat")


def flops_per_token(config: ModelConfig, T: int) -> float:
    """Model FLOPs of training on one token of a segment of T (see the module)."""
    matrices = sum(math.prod(p.shape) for p in parameter_table(config).values() if p.role in ("matrix", "unembedding"))
    if config.tie_embeddings:
        matrices += math.prod(parameter_table(config)["embedding.table"].shape)
    assert config.head_dim is not None
    window = min(config.sliding_window or T, T)
    keys = window * (1 - window / (2 * T))
    return 6 * matrices + 12 * config.num_layers * config.num_heads * config.head_dim * keys


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of all devices, where the figure is from); a CPU's is measured by one large matrix product."""
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.peak_flops * jax.device_count(), f"{kind} data sheet, dense bfloat16"
    n = 1024
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], "x")):
        # As `model.product` does it: what leaves is float32, and in bfloat16 that is the faster way.
        product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
        x = jnp.ones((n, n), dtype)
        product(x, x).block_until_ready()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores that one product already uses.
    machines = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * n**3 / min(seconds) * machines, f"a {n} × {n} {dtype} product measured here"


def memory_bytes() -> int:
    """The most so far of the fullest of this process's devices; of the process itself, where they don't tell."""
    of_devices = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    # macOS counts in bytes, Linux in KiB.
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(of_devices) or of_process


class StepLog:
    """A file with at most one line a step, written by process 0 alone. After a restart no step stands there twice.

    Args:
        path: of the file.
        step: the restored step; lines of later ones, and a torn last line, are dropped.
        writers: where the numbers also go.
    """

    def __init__(self, path: Path, step: int, writers: Sequence[Writer] = ()):
        self._path = path
        kept = [line for line, record in read_steps(path) if record["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = path.open("a")
        self._writers = writers

    def write(self, record: dict[str, Any]) -> None:
        """One step's line."""
        with writing("a line", self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for writer in self._writers:
            numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
            writer.write(record["step"], dict(scalars(numbers)))

    def close(self) -> None:
        """Everything to disk. Where it has no room that is only said: something else may have ended the run."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            log.warning("%s: not every line is on disk: %s", self._path, error.strerror)
        for writer in self._writers:
            writer.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record by their paths: {"a": {"b": [1, 2]}} gives "a/b/0" and "a/b/1", as of layers."""
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): x for i, x in enumerate(value)}
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def read_steps(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete (line, record) pairs of a `StepLog`, up to the first that is torn; none where there is no file."""
    records = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n"):
            break
        records.append((line, record))
    return records


class Rate:
    """Tokens a second and waiting for data, over the last finished steps."""

    def __init__(self, window: int = 10):
        self._ends: collections.deque[tuple[float, float]] = collections.deque(maxlen=window + 1)

    def start(self) -> None:
        """Forget what was before: a pause (evaluation, a save) is no step time."""
        self._ends.clear()
        self._ends.append((time.perf_counter(), 0.0))

    def finished(self, tokens: float) -> None:
        """A step over so many tokens has just finished."""
        self._ends.append((time.perf_counter(), tokens))

    @property
    def tokens_per_second(self) -> float:
        """Over the window."""
        return sum(tokens for _, tokens in list(self._ends)[1:]) / max(self._ends[-1][0] - self._ends[0][0], 1e-9)

    def seconds(self, tokens: float) -> float:
        """What so many more tokens will take."""
        return tokens / max(self.tokens_per_second, 1e-9)


class Display:
    """How a run looks while it goes: one live line on a terminal, a plain line every few steps in a log.

    Args:
        num_steps: of the run.
        every: steps between plain lines.
        quiet: show nothing (all processes but the first).
    """

    def __init__(self, num_steps: int, every: int, quiet: bool):
        self.num_steps, self.every, self.quiet = num_steps, every, quiet
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show one finished step."""
        if self.quiet:
            return
        step = record["step"]
        line = (
            f"step {step}/{self.num_steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['peak_share']:.0%} of peak  data wait {record['data_wait_seconds']:.2f} s  "
            f"ETA {duration(seconds_left)}"
        )
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
            done = 30 * step // self.num_steps
            self._live.update(Text(f"{'█' * done}{'·' * (30 - done)} {line}", no_wrap=True, overflow="ellipsis"))
        elif step % self.every == 0 or step in (1, self.num_steps):
            self.say(line)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show what an evaluation found: on held-out text, with a sample, on tasks, or on both."""
        if "sample" in record:
            bits, loss = record["validation_bits_per_byte"], record["validation_loss"]
            self.say(f"step {record['step']}  held-out: {bits:.3f} bits a byte, loss {loss:.4f}; sample:")
            self.say("\n".join("    " + line for line in record["sample"].splitlines()))
        for task, values in record.get("tasks", {}).items():
            found = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            self.say(f"step {record['step']}  {task}: {found}")

    def say(self, text: str) -> None:
        """Lines that stay."""
        if not self.quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
