"""The live line of a run on a terminal, and its lines in a log."""

import collections
import sys
import time
from contextlib import suppress
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

from data.mixture import Mixture, Source, corpus_field
from data.printable import printable
from model.kernels import choose_kernel
from model.parameters import count_parameters
from train.data_identity import RunInputs
from train.devices.rules import training_layout
from train.run.goodput import duration
from train.step.schedule import batch_size
from train.weights.huggingface import why_no_export


class Rate:
    """Tokens a second over the last finished steps."""

    def __init__(self, window: int = 10):
        self._ends: collections.deque[tuple[float, float]] = collections.deque(maxlen=window + 1)

    def start(self) -> None:
        """Forgets the steps so far, since a pause (evaluation, a save) is not step time."""
        self._ends.clear()
        self._ends.append((time.perf_counter(), 0.0))

    def finished(self, tokens: float) -> None:
        """Records that a step over `tokens` has just finished."""
        self._ends.append((time.perf_counter(), tokens))

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over the window of last steps."""
        return sum(tokens for _, tokens in list(self._ends)[1:]) / max(self._ends[-1][0] - self._ends[0][0], 1e-9)

    def seconds(self, tokens: float) -> float:
        """Returns the seconds that `tokens` more take at this rate."""
        return tokens / max(self.tokens_per_second, 1e-9)


class Display:
    """Shows a run as it trains: a live line on a terminal, or a plain line every few steps in a log."""

    def __init__(self, num_steps: int, every: int, quiet: bool):
        self.num_steps = num_steps
        self.every = every
        self.quiet = quiet
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """Shows one finished step."""
        if self.quiet:
            return
        step = record["step"]
        line = (
            f"step {step}/{self.num_steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{record['peak_share']:.0%} of peak  data wait {record['data_wait_seconds']:.2f} s  "
            f"ETA {duration(seconds_left)}"
        )
        if self._console.is_terminal:
            with suppress(OSError):
                if self._live is None:
                    self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                    self._live.start()
                done = 30 * step // self.num_steps
                self._live.update(Text(f"{'█' * done}{'·' * (30 - done)} {line}", no_wrap=True, overflow="ellipsis"))
        elif step % self.every == 0 or step in (1, self.num_steps):
            self.say(line)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Shows the results of an evaluation on held-out text, with a sample, and on tasks."""
        if "sample" in record:
            bits = record["validation_bits_per_byte"]
            loss = record["validation_loss"]
            self.say(f"step {record['step']}  held-out: {bits:.3f} bits a byte, loss {loss:.4f}; sample:")
            self.say("\n".join("    " + line for line in record["sample"].splitlines()))
        for task, values in record.get("tasks", {}).items():
            results = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            self.say(f"step {record['step']}  {task}: {results}")

    def say(self, text: str) -> None:
        """Prints lines that stay."""
        # A terminal that closes, as SIGHUP is about to say, must not end the run before it has saved.
        if not self.quiet:
            with suppress(OSError):
                self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Restores the terminal."""
        if self._live:
            with suppress(OSError):
                self._live.stop()


def opening_lines(inputs: RunInputs, step: int, peak: str) -> list[str]:
    """Returns lines that describe the model, its data and its devices."""
    config = inputs.config
    mesh = " × ".join(f"{axis} {size}" for axis, size in jax.sharding.get_mesh().shape.items() if size > 1)
    kernel = choose_kernel(config.model, training_layout(config.mesh), config.data.segment_length)
    first, full = (rows * config.data.segment_length for rows in (batch_size(config, 0), config.train.batch_size))
    tokens = f"{full:,} tokens each"
    if first < full:
        tokens += f", the first {config.train.batch_ramp_steps} steps on a ramp from {first:,}"
    action = f"resumes at step {step}" if step else "starts"
    lines = [
        f"{config.train.run_dir} {action} of {config.train.num_steps} steps, {tokens}",
        *(
            f"{corpus_field(source.name).removeprefix('data.')}: {source.corpus.describe()}, "
            f"fingerprint {source.corpus.fingerprint[:12]}{source_text(source, inputs.mixture)}"
            for source in inputs.mixture.sources
        ),
        f"tokenizer: {inputs.tokenizer.vocab_size:,} token ids",
        f"model: {count_parameters(config.model):,} parameters, {config.model.compute_dtype} compute",
        f"devices: {jax.device_count()} {jax.devices()[0].device_kind}{mesh and f' as {mesh}'}; "
        f"processes: {jax.process_count()}",
        f"attention: {kernel}",
        f"peak: {peak}",
    ]
    if config.train.ema_decay:
        lines.append(f"evaluated and exported: the moving average of the weights, decay {config.train.ema_decay}")
    if config.checkpoint.export and (problem := why_no_export(config.model)):
        lines.append(f"no export at the end: {problem}")
    return lines


def source_text(source: Source, mixture: Mixture) -> str:
    """Describes how often rows come from a corpus, and how often it is read."""
    sums = [sum(other.weight(step) for other in mixture.sources) for step, _ in source.weights]
    shares = [
        f"{weight / total:.1%} of the rows" + (f" from step {step}" if step else "")
        for (step, weight), total in zip(source.weights, sums, strict=True)
    ]
    epochs = [f"the run ends after its epoch {source.config.epochs}"] if source.config.epochs else []
    return "".join(f"; {word}" for word in ([*shares] if len(mixture.sources) > 1 else []) + epochs)
