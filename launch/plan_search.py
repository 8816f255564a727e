"""The search of `ziggurat plan --search` for the fastest way to run a step on a topology.

All candidates are estimated and the most promising are compiled, each by its own `ziggurat plan --json`, as many at
once as this machine has room for. They are ranked by the tokens a second that these commands print, which on the same
devices is the order of tokens a dollar, too. An interrupt ends the search early.
"""

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.plan_text import days_text, mesh_text, seconds_text, size_text
from train.planning.plan import Plan
from train.planning.search import PARTS, REMAT, Candidate, worth_compiling
from train.planning.this_machine import memory_available
from train.run.goodput import duration

log = logging.getLogger("ziggurat")
# Memory of a compiler with the program of a large model.
COMPILER_BYTES = 3 * 2**30
MAX_SHOWN = 10
# How long a search without a number of programs starts them, so that it ends within about a quarter of an hour: two
# cores have then compiled two for a v6e, each of which takes eight minutes.
MOST_SECONDS = 360.0


@dataclass(frozen=True)
class Outcome:
    """The result of compiling a candidate: its plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    problem: str = ""

    @property
    def seconds(self) -> float:
        """Estimated seconds of a step; infinite where it does not fit."""
        plan = self.plan
        return plan.estimated_step_seconds if plan and plan.fits and plan.estimated_step_seconds else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Estimated tokens a second; 0 where the step does not fit."""
        return self.plan.tokens_per_step / self.seconds if self.plan else 0.0


class Compiler(NamedTuple):
    """A running `ziggurat plan`, with output to `files`.json and `files`.log: it never blocks on a full pipe."""

    candidate: Candidate
    process: subprocess.Popen[bytes]
    files: str


def compile_best(
    candidates: Sequence[Candidate], most: int, flags: Sequence[str], most_seconds: float = math.inf
) -> list[Outcome]:
    """Compiles at most `most` candidates, until no other may be faster than the best of its batch size.

    After `most_seconds` it starts only those of a batch size of which none fits yet, one at a time. Returns the
    outcomes, those with the most tokens a second first. The candidates are sorted by their estimates and share these
    flags of `ziggurat plan`.
    """
    outcomes: list[Outcome] = []
    waiting = list(candidates)
    running: list[Compiler] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                compiled = [(outcome.candidate, outcome.seconds) for outcome in outcomes if outcome.seconds < math.inf]
                waiting = [candidate for candidate in waiting if worth_compiling(candidate, compiled)]
                waiting = waiting[: most - len(outcomes) - len(running)]
                is_late = time.monotonic() - start > most_seconds
                if is_late and not running:
                    done_sizes = {candidate.batch_size for candidate, _ in compiled}
                    late = [candidate for candidate in waiting if candidate.batch_size in done_sizes]
                    waiting = [candidate for candidate in waiting if candidate.batch_size not in done_sizes]
                    if late:
                        log.info("time is up: %d more may be faster; --search=N compiles N", len(late))
                while waiting and len(running) < (1 if is_late else max_compilers()):
                    files = f"{folder}/{len(outcomes) + len(running)}"
                    running.append(start_compiler(waiting.pop(0), flags, files))
                time.sleep(0.1)
                for compiler in [compiler for compiler in running if compiler.process.poll() is not None]:
                    running.remove(compiler)
                    outcomes.append(read_outcome(compiler))
                    done, remaining = len(outcomes), len(waiting) + len(running)
                    left_seconds = (time.monotonic() - start) / done * remaining
                    time_left = f"; at most {duration(left_seconds)} more" if remaining else ""
                    log.info("%d of %d  %s%s", done, done + remaining, outcome_text(outcomes[-1]), time_left)
        except KeyboardInterrupt:
            log.info("interrupted: ranking what is compiled")
        finally:
            for compiler in running:
                compiler.process.kill()
                compiler.process.wait()
    return sorted(outcomes, key=lambda outcome: -outcome.tokens_per_second)


def max_compilers() -> int:
    """Returns the number of compilers for which this machine has processors and memory."""
    return max(1, min(os.cpu_count() or 1, memory_available() // COMPILER_BYTES))


def start_compiler(candidate: Candidate, flags: Sequence[str], files: str) -> Compiler:
    """Starts the plan of a candidate."""
    command = [sys.executable, "-m", "launch.cli", "plan", "--json", *flags, *change_flags(candidate)]
    with open(f"{files}.json", "wb") as output, open(f"{files}.log", "wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
    return Compiler(candidate, process, files)


def read_outcome(compiler: Compiler) -> Outcome:
    """Reads the output of a compiler that has ended."""
    if compiler.process.returncode == 0:
        return Outcome(compiler.candidate, Plan(**json.loads(Path(f"{compiler.files}.json").read_bytes())))
    lines = Path(f"{compiler.files}.log").read_text(errors="replace").strip().splitlines()
    return Outcome(compiler.candidate, None, lines[-1] if lines else f"exit status {compiler.process.returncode}")


def change_flags(candidate: Candidate) -> list[str]:
    """Returns the fields of a candidate as flags."""
    return [f"--config.{name}={value}" for name, value in candidate.changes.items()]


def candidate_text(candidate: Candidate) -> str:
    """Returns a candidate as in "batch 64 on fsdp 8 × tensor 2, 4 rows × 2 parts, full"."""
    parts = candidate.changes[PARTS]
    rows = f"{candidate.rows:,} row{'s' * (candidate.rows > 1)}" + (f" × {parts} parts" if parts != "1" else "")
    return f"batch {candidate.batch_size:,} on {mesh_text(candidate.mesh)}, {rows}, {candidate.changes[REMAT]}"


def outcome_text(outcome: Outcome) -> str:
    """Returns a candidate and the figures of its plan."""
    name, plan = candidate_text(outcome.candidate), outcome.plan
    if plan is None:
        return f"{name}: failed: {outcome.problem}"
    memory = size_text(plan.peak_bytes_per_device)
    if not plan.fits or plan.estimated_step_seconds is None or plan.estimated_mfu is None or plan.days is None:
        return f"{name}: does not fit: {memory}"
    cost = "" if plan.cost is None else f", ${plan.cost:,.0f}"
    speed = f"{seconds_text(plan.estimated_step_seconds)}, {outcome.tokens_per_second:,.0f} tokens/s"
    return f"{name}: {speed}, {plan.estimated_mfu:.1%} MFU, {memory}, {days_text(plan.days)}{cost}"


def search_text(outcomes: Sequence[Outcome], count: int, same_tokens: bool = False) -> str:
    """Returns the ranking of outcomes, the fastest first, and the flags of the best.

    Args:
        outcomes: what was compiled.
        count: number of all candidates.
        same_tokens: whether the flags give the number of steps, too, as batches of another size need.
    """
    lines = [f"{count:,} legal ways to run the step that may fit, {len(outcomes)} compiled; the fastest:"]
    lines += [f"{place:>4}  {outcome_text(outcome)}" for place, outcome in enumerate(outcomes[:MAX_SHOWN], 1)]
    best = outcomes[0] if outcomes else None
    if best and best.plan and best.plan.fits:
        flags, tokens = change_flags(best.candidate), ""
        if same_tokens:
            # Batches of another size come to the same tokens in another number of steps.
            flags.append(f"--config.train.num_steps={math.ceil(best.plan.tokens / best.plan.tokens_per_step)}")
            tokens = f" for {best.plan.tokens:.3g} tokens"
        lines += [f"the best, as flags of plan and pretrain{tokens}:", *flags]
    else:
        lines.append("none of them fits")
    return "\n".join(lines)
