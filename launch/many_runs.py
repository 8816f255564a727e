"""Trains many runs one after the other, each by `ziggurat pretrain` in a process of its own.

They are ordinary runs: what has stopped goes on where it was, and what is finished is found and left alone.
"""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError
from data.files.writable import why_not_writable
from launch.local import DONE, PREEMPTED, Exit, run_processes, supervise
from launch.presets import load_config
from train.config.changes import changes_of, table
from train.config.config import Config, public
from train.prepare import is_claimed
from train.run.events import read_events
from train.run.folder import Run
from train.run.goodput import duration
from train.run.step_log import held_out_figure, read_metrics

# How often in a row a run that saves nothing new is started again.
RESTARTS = 3


class PlannedRun(NamedTuple):
    """One of many runs.

    Attributes:
        config: its settings, as `ziggurat pretrain` will load them.
        words: the command that trains it, after `ziggurat`.
    """

    config: Config
    words: tuple[str, ...]

    @property
    def run(self) -> Run:
        """The run's folder, which may not exist yet."""
        return Run.from_config(self.config)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.run.folder.name


def plan_run(folder: Path, config: str, overrides: Mapping[str, str]) -> PlannedRun:
    """Returns the run in a folder of a config (NAME|FILE|RUN) with overrides by "group.field". InputError if wrong."""
    fields = {**overrides, "train.run_dir": str(folder)}
    flags = (f"--config.{name}={value}" for name, value in fields.items())
    return PlannedRun(load_config(config, fields), ("pretrain", f"--config={config}", *flags))


def folder_problems(runs: Sequence[PlannedRun]) -> list[str]:
    """Returns a problem for each folder that cannot be used, or holds a run that was begun with other settings.

    A learning rate may change on resume, but then the run is no longer one of its variant; so any change is refused but
    that of a field whose resume rule is "free", and of its corpus.
    """
    problems = []
    for planned in runs:
        run = planned.run
        try:
            if problem := why_not_writable(run.folder):
                problems.append(f"{run.folder}: {problem}; name another folder")
            elif is_claimed(run) and run.last_step() is not None:
                saved = run.load_config()
                changes = changes_of(saved, public(planned.config.resolved(saved.model.vocab_size)))
                changed = [*changes["frozen"], *changes["warn"]]
                if changed := changed + [change for change in changes["free"] if change.field == "data.corpus"]:
                    problems.append(
                        f"{run.folder} holds a run with other settings:\n{table(changed)}\n"
                        "  give the values from before, name another variant or folder, or remove that run"
                    )
        except InputError as error:
            problems.append(str(error))
    return problems


def is_finished(run: Run) -> bool:
    """True if a run has come to its end: the last of its steps, or of its corpus."""
    if not run.config_file.exists():
        return False
    events = read_events(run.events)
    if events and events[-1]["event"] == "end":
        return True
    # A kill after the last save leaves no such event, and nothing to train.
    step = run.last_step()
    return step is not None and (step == run.load_config().train.num_steps or run.has_read_all(step))


def unfinished(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Returns the runs that have not come to their end."""
    return [planned for planned in runs if not is_finished(planned.run)]


def train_all(runs: Sequence[PlannedRun]) -> int:
    """Trains all runs that are not finished, in order, and returns the exit status that ended this: 0 if all are.

    When one is given up or stopped, those after it do not begin; else as `train_each`.
    """
    return next(iter(train_each(runs, goes_on=False).values()), DONE)


def train_each(runs: Sequence[PlannedRun], goes_on: bool = True) -> dict[str, int]:
    """Trains all runs that are not finished, in order, and returns the exit status of each that did not end, by name.

    A run that fails is started again as by `ziggurat launch local`. Where one is given up, those after it begin only if
    this `goes_on`; where this process is asked to stop (PREEMPTED), they never do. The same call goes on from there.

    Raises InputError as `folder_problems` has it, before the first begins.
    """
    if problems := folder_problems(runs):
        raise InputError("\n".join(problems))
    failed: dict[str, int] = {}
    for planned in unfinished(runs):
        number = runs.index(planned) + 1
        say(f"{planned.name}: run {number} of {len(runs)} begins")
        begun = time.monotonic()
        if status := train(planned):
            say(f"{planned.name}: ended with status {status}; the same command goes on from there")
            failed[planned.name] = status
            if status == PREEMPTED or not goes_on:
                break
        else:
            say(f"{planned.name}: {ending(planned.run)}, {duration(time.monotonic() - begun)}")
    return failed


def train(planned: PlannedRun) -> int:
    """Trains one run to its end; returns its exit status: PREEMPTED where, and only where, a signal asked to stop."""
    command = [sys.executable, "-P", "-m", "launch.cli", *planned.words]
    ends: list[Exit] = []

    def start() -> Exit:
        ends.append(run_processes(command, [os.environ], with_prefix=False))
        return ends[-1]

    status = supervise(start, planned.run.folder, RESTARTS)
    return PREEMPTED if ends[-1].was_asked else status


def ending(run: Run) -> str:
    """Returns the last step of a run and its figure, in words."""
    last = read_metrics(run.metrics)[-1:]
    if not last or "validation_bits_per_byte" not in last[0]:
        return "finished"
    return f"step {last[0]['step']:,}, {held_out_figure(last[0], 'bits_per_byte'):.4f} bits a byte held out"


def command_line(planned: PlannedRun) -> str:
    """Returns the command of a run for a shell."""
    return shlex.join(["ziggurat", *planned.words])


def say(text: str) -> None:
    """Prints a line on standard error; a terminal that has closed must not end the runs."""
    with suppress(OSError):
        print("ziggurat:", text, file=sys.stderr, flush=True)
