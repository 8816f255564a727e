"""The live view of a run on a terminal, and its lines in a log."""

import collections
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TextIO, cast

import jax
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from data.mixture import Mixture, Source, corpus_field
from data.printable import printable
from model.kernels import choose_kernel
from model.parameters import parameters_text
from train.data_identity import RunInputs
from train.devices.rules import training_layout
from train.planning.data_estimate import DataEstimate
from train.run.curve import Curve, bar
from train.run.goodput import duration
from train.step.schedule import batch_size
from train.weights.huggingface import why_no_export

# Activity of the time account → its name in the live view. Others are too short to be named.
PAUSES = {"compile": "compiling", "evaluation": "evaluating", "checkpoint": "saving"}
# Columns of a bar without a curve: it gets the room that the figures leave.
LEAST_BAR, MOST_BAR = 10, 30
# Columns and lines of the curve, and lines of the terminal that are left to other text.
LEAST_WIDTH, MOST_WIDTH = 50, 120
LEAST_CURVE, MOST_CURVE = 6, 16
OTHER_LINES = 12
# Lines of a sample on a terminal.
SAMPLE_LINES = 2


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
    """Shows a run as it trains: a live view on a terminal, or a plain line every few steps in a log.

    The live view is drawn twice a second for the terminal's present size: a line with as many figures as fit,
    and where there is room the curve of the run. In a pause it names the `activity` of the run's time account.

    Attributes:
        curve: the figures so far; any thread may add to it.
    """

    def __init__(self, num_steps: int, every: int, quiet: bool, activity: Callable[[], str] = lambda: "steps"):
        self.num_steps = num_steps
        self.every = every
        self.quiet = quiet
        self.curve = Curve(num_steps)
        self._activity = activity
        self._console = Console(file=cast(IO[str], Unfailing(sys.stderr)))
        self._live: Live | None = None
        self._log_handlers: list[logging.StreamHandler] = []
        self._step = 0
        self._pause, self._pause_begun = "", 0.0
        self._said_empty = False
        self._figures: list[str] = []
        self._drawn: list[int] = []  # columns of the lines that were drawn last

    def begin(self, step: int, in_background: Callable[[], None] = lambda: None) -> None:
        """Begins the live view, on a terminal, after `step` steps, and calls a function in a thread."""
        self._step = step
        console = self._console
        is_live = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        if not is_live or self.quiet or self._live is not None:
            return
        root = logging.getLogger()
        self._log_handlers = [h for h in root.handlers if getattr(h, "stream", None) is sys.stderr]  # type: ignore[misc]
        self._live = Live(self, console=console, refresh_per_second=2)
        self._live.start(refresh=True)
        self._use_standard_error()  # which is now Rich's, so that log lines come above the live view

        def run() -> None:
            try:
                in_background()
            except Exception as error:  # The run goes on without it.
                self.say(f"the curve lacks earlier steps or its references: {type(error).__name__}: {error}")

        threading.Thread(target=run, name="display", daemon=True).start()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, console.size.height
        try:
            lines = self._lines(width, height)
        except Exception as error:  # A view must not end the run that it shows.
            lines = [Text(f"step {self._step}/{self.num_steps}  (no view: {type(error).__name__}: {error})")]
        # A terminal that has become narrower has wrapped the lines on it, so Rich would leave some of them.
        wrapped = sum(max(columns - 1, 0) // max(width, 1) for columns in self._drawn)
        if wrapped and self._live:
            yield Segment(f"\x1b[{wrapped}A\x1b[J", None, [(ControlType.CURSOR_UP, wrapped)])
        self._drawn = [min(line.cell_len, width) for line in lines]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line

    def _lines(self, width: int, height: int) -> list[Text]:
        """Returns the live view: figures, and where there is room the curve above a bar of the same length."""
        line = f"step {self._step}/{self.num_steps}"
        for figure in filter(None, (self._pause_text(), *self._figures)):
            if len(line) + 2 + len(figure) >= width:
                break
            line += f"  {figure}"
        rows = min(height - OTHER_LINES, MOST_CURVE)
        if width >= LEAST_WIDTH and rows >= LEAST_CURVE:
            return [Text(line), *self.curve.draw(min(width - 1, MOST_WIDTH), rows, self._step)]
        room = min(width - len(line) - 3, MOST_BAR)
        return [Text(f"{line}  {bar(self._step / self.num_steps, room)}" if room >= LEAST_BAR else line)]

    def _pause_text(self) -> str:
        """Returns the name of the present pause and its seconds."""
        now, pause = time.monotonic(), PAUSES.get(self._activity(), "")
        if pause != self._pause:
            self._pause, self._pause_begun = pause, now
        seconds = round(now - self._pause_begun)
        return f"{pause} {seconds} s" if pause and seconds else pause

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        """Shows one finished step."""
        if self.quiet:
            return
        self._step = step = record["step"]
        self.curve.add(record)
        loss = "no token trained on" if record["loss"] is None else f"loss {record['loss']:.4f}"
        if "accuracy" in record:
            loss += f"  accuracy {record['accuracy']:.1%}  margin {record['margin']:.3f}"
        if "reward" in record:
            loss = f"reward {record['reward']:.4f}  {loss}"
        rate = f"{record['tokens_per_second']:,.0f} tokens/s"
        share = f"{record['peak_share']:.0%} of peak"
        wait = f"data wait {record['data_wait_seconds']:.2f} s"
        eta = f"ETA {duration(seconds_left)}"
        if record["loss"] is None and not self._said_empty:
            self._said_empty = True
            why = (
                "its rows lie within prompts, so no token is trained on and the step changes nothing; raise "
                "data.segment_length above the prompts' tokens, or shorten the prompts"
            )
            if "reward" in record:
                why = "all answers to a prompt have the same reward, so the step changes nothing"
            self.say(f"step {step}: {why}")
        self._figures = [loss, eta, rate, wait, share]  # in the order in which they matter
        if not self._live and (step % self.every == 0 or step in (1, self.num_steps)):
            self.say("  ".join([f"step {step}/{self.num_steps}", loss, rate, share, wait, eta]))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Shows the results of an evaluation on held-out text, with a sample, and on tasks."""
        pairs = ""
        if "validation_preference_loss" in record:
            accuracy, margin = record["validation_preference_accuracy"], record["validation_margin"]
            pairs = f"pairs: loss {record['validation_preference_loss']:.4f}, accuracy {accuracy:.1%}"
            pairs += f", margin {margin:.3f}"
        if pairs and "sample" not in record:
            self.say(f"step {record['step']}  held-out {pairs}")
        if "sample" in record:
            self.curve.add(record)
            bits = record["validation_bits_per_byte"]
            loss = record["validation_loss"]
            whole = ""
            if "held_out_bits_per_byte" in record:
                whole = f"; all held-out documents: {record['held_out_bits_per_byte']:.3f} bits a byte"
            whole += f"; {pairs}" if pairs else ""
            if "validation_reward" in record:
                whole += f"; reward {record['validation_reward']:.4f}"
            whole += "; sample:" if record["sample"] else ""
            self.say(f"step {record['step']}  held-out: {bits:.3f} bits a byte, loss {loss:.4f}{whole}")
            if record["sample"]:
                self.say("\n".join("    " + line for line in self._sample_lines(record["sample"])))
        for task, values in record.get("tasks", {}).items():
            results = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            self.say(f"step {record['step']}  {task}: {results}")

    def _sample_lines(self, sample: str) -> list[str]:
        """Returns the lines of a sample; above a live view few, filled to the width of the terminal."""
        lines = sample.splitlines()
        if not self._live:
            return lines
        text = " ↵ ".join(words for line in lines if (words := " ".join(line.split())))
        wrapped = Text(printable(text)).wrap(self._console, max(self._console.width - 6, 1))
        shown = [line.plain.rstrip() for line in wrapped[:SAMPLE_LINES]]
        return shown if len(shown) == len(wrapped) else [*shown[:-1], f"{shown[-1]} …"]

    def say(self, text: str) -> None:
        """Prints lines that stay."""
        if not self.quiet:
            self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live view, whose last state stays, and restores the terminal."""
        if self._live:
            self._activity = lambda: "steps"
            self._live.stop()
            self._use_standard_error()

    def _use_standard_error(self) -> None:
        for handler in self._log_handlers:
            handler.setStream(sys.stderr)


def opening_lines(inputs: RunInputs, estimate: DataEstimate, step: int, peak: str) -> list[str]:
    """Returns lines that describe the model, its data and its devices."""
    config = inputs.config
    mesh = " × ".join(f"{axis} {size}" for axis, size in jax.sharding.get_mesh().shape.items() if size > 1)
    kernel = choose_kernel(config.model, training_layout(config.mesh), config.data.segment_length)
    first, full = (rows * config.data.segment_length for rows in (batch_size(config, 0), config.train.batch_size))
    tokens = f"{full:,} tokens each"
    if first < full:
        tokens += f", the first {config.train.batch_ramp_steps} steps on a ramp from {first:,}"
    products = f", {config.model.matmul_dtype} products" if config.model.matmul_dtype else ""
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
        f"model: {parameters_text(config.model)} parameters, {config.model.compute_dtype} compute{products}",
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
