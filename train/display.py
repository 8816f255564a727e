"""The live line of a run on a terminal, and its lines in a log."""

import collections
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TextIO, cast

import jax
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from data.mixture import Mixture, Source, corpus_field
from data.printable import printable
from model.kernels import choose_kernel
from model.parameters import count_parameters
from train.data_identity import RunInputs
from train.devices.rules import training_layout
from train.planning.data_estimate import DataEstimate
from train.run.goodput import duration
from train.step.schedule import batch_size
from train.weights.huggingface import why_no_export

# Activity of the time account → its name in the live line. Others are too short to be named.
PAUSES = {"compile": "compiling", "evaluation": "evaluating", "checkpoint": "saving"}
# Columns of the live line's bar: it gets the room that the figures leave.
LEAST_BAR, MOST_BAR = 10, 30


class Rate:
    """Tokens a second over the last finished steps."""

    def __init__(self, window: int = 10):
        # End of each step, its tokens, and those of them that were computed.
        self._ends: collections.deque[tuple[float, float, float]] = collections.deque(maxlen=window + 1)

    def start(self) -> None:
        """Forgets the steps so far, since a pause (evaluation, a save) is not step time."""
        self._ends.clear()
        self._ends.append((time.perf_counter(), 0.0, 0.0))

    def finished(self, tokens: float, is_computed: bool = True) -> None:
        """Records that a step over `tokens` has just finished; an empty batch is passed over, not computed."""
        self._ends.append((time.perf_counter(), tokens, tokens * is_computed))

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second that were computed over the window of last steps."""
        return self._over_time(2)

    def seconds(self, tokens: float) -> float:
        """Returns the seconds that `tokens` more take at this rate."""
        return tokens / max(self._over_time(1), 1e-9)

    def _over_time(self, column: int) -> float:
        return sum(end[column] for end in list(self._ends)[1:]) / max(self._ends[-1][0] - self._ends[0][0], 1e-9)


class Unfailing:
    """A stream of text, usually standard error, writes to which never fail.

    A terminal that closes, a reader of a pipe that goes, or a full disk behind a log must not end a run. Rich would end
    it: by the error itself, or by SystemExit where a pipe has no reader.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text if that is possible, and returns its length."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what has been written, if that is possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """Shows a run as it trains: a live line on a terminal, or a plain line every few steps in a log.

    The live line is redrawn several times a second for the terminal's present width, with as many figures as fit. In a
    pause it names the `activity` of the run's time account.
    """

    def __init__(self, num_steps: int, every: int, quiet: bool, activity: Callable[[], str] = lambda: "steps"):
        self.num_steps = num_steps
        self.every = every
        self.quiet = quiet
        self._activity = activity
        self._console = Console(file=cast(IO[str], Unfailing(sys.stderr)))
        self._live: Live | None = None
        self._step = 0
        self._said_empty = False
        self._figures: list[str] = []

    def begin(self, step: int) -> None:
        """Begins the live line, on a terminal, after `step` steps."""
        self._step = step
        if self._console.is_terminal and not self.quiet and self._live is None:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = f"step {self._step}/{self.num_steps}"
        for figure in filter(None, (PAUSES.get(self._activity(), ""), *self._figures)):
            if len(line) + 2 + len(figure) >= options.max_width:
                break
            line += f"  {figure}"
        room = min(options.max_width - len(line) - 2, MOST_BAR)
        done = room * self._step // self.num_steps
        bar = f"{'█' * done}{'·' * (room - done)} " if room >= LEAST_BAR else ""
        yield Text(bar + line, no_wrap=True, overflow="ellipsis")

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """Shows one finished step."""
        if self.quiet:
            return
        self._step = step = record["step"]
        loss = "no token trained on" if record["loss"] is None else f"loss {record['loss']:.4f}"
        rate = f"{record['tokens_per_second']:,.0f} tokens/s"
        share = f"{record['peak_share']:.0%} of peak"
        wait = f"data wait {record['data_wait_seconds']:.2f} s"
        eta = f"ETA {duration(seconds_left)}"
        if record["loss"] is None and not self._said_empty:
            self._said_empty = True
            self.say(
                f"step {step}: its rows lie within prompts, so no token is trained on and the step changes nothing; "
                "raise data.segment_length above the prompts' tokens, or shorten the prompts"
            )
        self._figures = [loss, eta, rate, wait, share]  # in the order in which they matter
        if not self._live and (step % self.every == 0 or step in (1, self.num_steps)):
            self.say("  ".join([f"step {step}/{self.num_steps}", loss, rate, share, wait, eta]))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Shows the results of an evaluation on held-out text, with a sample, and on tasks."""
        if "sample" in record:
            bits = record["validation_bits_per_byte"]
            loss = record["validation_loss"]
            whole = ""
            if "held_out_bits_per_byte" in record:
                whole = f"; all held-out documents: {record['held_out_bits_per_byte']:.3f} bits a byte"
            self.say(f"step {record['step']}  held-out: {bits:.3f} bits a byte, loss {loss:.4f}{whole}; sample:")
            self.say("\n".join("    " + line for line in record["sample"].splitlines()))
        for task, values in record.get("tasks", {}).items():
            results = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            self.say(f"step {record['step']}  {task}: {results}")

    def say(self, text: str) -> None:
        """Prints lines that stay."""
        if not self.quiet:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Restores the terminal."""
        if self._live:
            self._live.stop()


def opening_lines(inputs: RunInputs, estimate: DataEstimate, step: int, peak: str) -> list[str]:
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
            f"{estimate.text(source.name)}"
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
    return lines + estimate.warnings(config)


def source_text(source: Source, mixture: Mixture) -> str:
    """Describes how often rows come from a corpus, and how often it is read."""
    sums = [sum(other.weight(step) for other in mixture.sources) for step, _ in source.weights]
    shares = [
        f"{weight / total:.1%} of the rows" + (f" from step {step}" if step else "")
        for (step, weight), total in zip(source.weights, sums, strict=True)
    ]
    epochs = [f"the run ends after its epoch {source.config.epochs}"] if source.config.epochs else []
    return "".join(f"; {word}" for word in ([*shares] if len(mixture.sources) > 1 else []) + epochs)
