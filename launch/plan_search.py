"""`ziggurat plan --search`: the fastest way to run a step on a topology.

All are estimated, the most promising compiled, each by a `ziggurat plan --json` of its own, as many at once as this
machine has room for: what they are ranked by is what that command says, and an interrupt ends it.
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

from launch.plan_text import mesh_text, seconds_text, size_text
from train.planning.plan import Plan
from train.planning.search import PARTS, REMAT, Candidate, worth_compiling
from train.planning.this_machine import memory_available
from train.run.goodput import duration

log = logging.getLogger("ziggurat")
# A compiler's memory with the program of a large model.
COMPILER_BYTES = 3 * 2**30
SHOWN = 10


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: its plan, or what its command said instead."""

    candidate: Candidate
    plan: Plan | None
    problem: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it does not fit."""
        plan = self.plan
        return plan.estimated_step_seconds if plan and plan.fits and plan.estimated_step_seconds else math.inf


class Compiler(NamedTuple):
    """A command under way; its output goes to files, so that it never waits for a reader."""

    candidate: Candidate
    process: subprocess.Popen[bytes]
    files: str


def ranked(candidates: Sequence[Candidate], most: int, flags: Sequence[str]) -> list[Outcome]:
    """Compile candidates until none that is left may be faster, or `most` are compiled; the best first.

    An interrupt ends it early, with what there is.

    Args:
        candidates: the fastest first, by their estimates.
        most: programs to compile.
        flags: of `ziggurat plan`, the same for all.
    """
    outcomes: list[Outcome] = []
    left, running = list(candidates), list[Compiler]()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while left or running:
                compiled = [(o.candidate, o.seconds) for o in outcomes if o.seconds < math.inf]
                left = [candidate for candidate in left if worth_compiling(candidate, compiled)]
                left = left[: most - len(outcomes) - len(running)]
                while left and len(running) < at_once():
                    running.append(begin(left.pop(0), flags, f"{folder}/{len(outcomes) + len(running)}"))
                time.sleep(0.1)
                for compiler in [compiler for compiler in running if compiler.process.poll() is not None]:
                    running.remove(compiler)
                    outcomes.append(end(compiler))
                    log.info("%s", progress_text(outcomes, len(left) + len(running), time.monotonic() - start))
        except KeyboardInterrupt:
            log.info("interrupted: ranking what is compiled")
        finally:
            for compiler in running:
                compiler.process.kill()
                compiler.process.wait()
    return sorted(outcomes, key=lambda outcome: outcome.seconds)


def at_once() -> int:
    """Compilers for which this machine has processors and memory."""
    return max(1, min(os.cpu_count() or 1, memory_available() // COMPILER_BYTES))


def begin(candidate: Candidate, flags: Sequence[str], files: str) -> Compiler:
    """Start the plan of a candidate; its output goes to files with this beginning of their names."""
    command = [sys.executable, "-m", "launch.cli", "plan", "--json", *flags, *change_flags(candidate)]
    with open(f"{files}.json", "wb") as output, open(f"{files}.log", "wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=said)
    return Compiler(candidate, process, files)


def end(compiler: Compiler) -> Outcome:
    """Read what a command that has ended left."""
    if compiler.process.returncode == 0:
        return Outcome(compiler.candidate, Plan(**json.loads(Path(f"{compiler.files}.json").read_bytes())))
    lines = Path(f"{compiler.files}.log").read_text(errors="replace").strip().splitlines()
    return Outcome(compiler.candidate, None, lines[-1] if lines else f"exit status {compiler.process.returncode}")


def change_flags(candidate: Candidate) -> list[str]:
    """The fields of a candidate, as the command line takes them."""
    return [f"--config.{name}={value}" for name, value in candidate.changes.items()]


def candidate_text(candidate: Candidate) -> str:
    """As in "fsdp 8 × tensor 2, 4 rows, full"."""
    rows, (parts, policy) = candidate.rows, (candidate.changes[name] for name in (PARTS, REMAT))
    of_parts = f" × {parts} parts" if parts != "1" else ""
    return f"{mesh_text(candidate.mesh)}, {rows} row{'s' * (rows > 1)}{of_parts}, {policy}"


def progress_text(outcomes: Sequence[Outcome], left: int, seconds: float) -> str:
    """What the last command found, and how long the others will take."""
    last, most = outcomes[-1], len(outcomes) + left
    remaining = f"; at most {duration(seconds / len(outcomes) * left)} more" if left else ""
    return f"{len(outcomes)} of {most}  {candidate_text(last.candidate)}: {outcome_text(last)}{remaining}"


def outcome_text(outcome: Outcome) -> str:
    """A candidate's figures in a line."""
    plan = outcome.plan
    if plan is None:
        return f"failed: {outcome.problem}"
    memory = size_text(plan.peak_bytes_per_device)
    if not plan.fits or plan.estimated_step_seconds is None or plan.estimated_mfu is None:
        return f"does not fit: {memory}"
    return f"{seconds_text(plan.estimated_step_seconds)}, {plan.estimated_mfu:.1%} MFU, {memory}"


def search_text(outcomes: Sequence[Outcome], count: int) -> str:
    """The ranking, and the flags of the best."""
    lines = [f"{count:,} legal ways to run the step that may fit, {len(outcomes)} compiled; the fastest:"]
    lines += [
        f"{place:>4}  {candidate_text(o.candidate)}: {outcome_text(o)}" for place, o in enumerate(outcomes[:SHOWN], 1)
    ]
    if outcomes and outcomes[0].seconds < math.inf:
        return "\n".join([*lines, "the best, as flags of plan and pretrain:", *change_flags(outcomes[0].candidate)])
    return "\n".join([*lines, "none of them fits"])
