"""The runs of a ladder: trunks and branches of each rung, their plan, and what they say once they are finished."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.errors import InputError
from data.files.atomic import atomic_file
from data.files.json_file import read_json
from launch.many_runs import PlannedRun, folder_problems, plan_run
from launch.step_times import time_steps
from train.config.changes import Change, table
from train.config.config import Config, config_fields, to_json
from train.planning.budget import Budget
from train.planning.family import Rung, make_rungs, size_of
from train.planning.plan import tokens_of_run
from train.planning.scaling import LEAST_SIZES, Fit, Interval, fit_law
from train.run.comparison import outcome_of
from train.step.flops import flops_per_token

LADDER_FILE = "ladder.json"


@dataclass(frozen=True)
class Ladder:
    """The plan of a ladder.

    Attributes:
        target: the config whose loss is predicted.
        flags: what it is made by, apart from the config.
        rungs: the smallest first, each with its trunk and its branches.
    """

    folder: Path
    target: Config
    flags: dict[str, float]
    rungs: list[Rung]
    trunks: list[PlannedRun]
    branches: list[list[PlannedRun]]

    @property
    def runs(self) -> list[PlannedRun]:
        """All runs in the order of training, a trunk before its branches."""
        return [run for trunk, of_rung in zip(self.trunks, self.branches, strict=True) for run in (trunk, *of_rung)]

    @property
    def target_tokens(self) -> int:
        """Tokens of the target's own run."""
        return tokens_of_run(self.target.resolved(self.target.tokenizer.vocab_size))

    @property
    def target_flops(self) -> float:
        """FLOPs of the target's own run."""
        return 6 * size_of(self.target) * self.target_tokens

    @property
    def cheapest_flops(self) -> float:
        """FLOPs of the first branch of the first rung."""
        return 6 * self.rungs[0].N * self.rungs[0].branches[0][1] * self.rungs[0].step_tokens

    @property
    def flops(self) -> float:
        """FLOPs of all runs."""
        return sum(6 * rung.N * rung.steps * rung.step_tokens for rung in self.rungs)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Values by which the same ladder is known again."""
        return {"flags": self.flags, "config": json.loads(to_json(self.target))}


class Point(NamedTuple):
    """One finished branch.

    Attributes:
        N: FLOPs of a token / 6.
        D: tokens that it has read, those of its trunk included.
        bits: bits a byte of all held-out documents.
    """

    run: str
    N: float
    D: float
    bits: float


class HeldBack(NamedTuple):
    """A point of the largest rung, and what the law of the other rungs predicts for it."""

    point: Point
    predicted: float


class Best(NamedTuple):
    """The best use of a budget: N, D, and the loss there."""

    N: Interval
    D: Interval
    bits: Interval


@dataclass(frozen=True)
class Result:
    """A fitted ladder.

    Attributes:
        held_back: predictions for the largest rung from the others; none where these are too few.
        N: size of the target.
        D: tokens of the target's own run.
        prediction: its loss.
    """

    points: list[Point]
    fit: Fit
    held_back: list[HeldBack]
    N: float
    D: float
    prediction: Interval
    budget: Budget
    best: Best


def planned_ladder(
    config: str, overrides: Mapping[str, str], target: Config, folder: Path, flags: dict[str, float]
) -> Ladder:
    """Returns the plan of a ladder. Raises InputError where the target has no such family, or a run cannot be."""
    least = {name: int(flags[name]) for name in ("least_rows", "least_steps")}
    rungs = make_rungs(target, int(flags["rungs"]), flags["scale"], flags["longest"], **least)
    trunks, branches = zip(
        *(plan_rung(folder, f"rung-{number}", rung, config, overrides, target) for number, rung in enumerate(rungs, 1)),
        strict=True,
    )
    return Ladder(folder, target, flags, rungs, [*trunks], [*branches])


def plan_rung(
    folder: Path, name: str, rung: Rung, config: str, overrides: Mapping[str, str], target: Config
) -> tuple[PlannedRun, list[PlannedRun]]:
    """Returns the plan of a rung's trunk and of its branches. Raises InputError where a run cannot be."""
    trunk = planned(folder / f"{name}-trunk", config, overrides, trunk_fields(target, rung))
    branches = []
    for place, (begin, end) in enumerate(rung.branches, 1):
        origin = f"{os.path.abspath(folder / f'{name}-trunk')}@{begin}"
        fields = branch_fields(target, rung, begin, end) | {"train.init_from": origin}
        branches.append(planned(folder / f"{name}-branch-{place}", config, overrides, fields))
    return trunk, branches


def planned(folder: Path, config: str, overrides: Mapping[str, str], fields: Mapping[str, Any]) -> PlannedRun:
    """Returns the plan of one run. Raises InputError with all that is wrong, each line with the run's name."""
    texts = {name: "none" if value is None else str(value) for name, value in fields.items()}
    try:
        return plan_run(folder, config, {**overrides, **texts})
    except InputError as error:
        raise InputError("\n".join(f"{folder.name}: {line}" for line in str(error).splitlines())) from None


def common_fields(target: Config, rung: Rung, steps: int) -> dict[str, Any]:
    """Returns the fields of all runs of a rung: evaluated at the end alone, and neither sampled nor exported."""
    tasks = {"evaluation.tasks": None, "evaluation.task_dir": None} if target.evaluation.tasks else {}
    fields = {
        "train.num_steps": steps, "train.profile_steps": None, "evaluation.every_steps": steps,
        "evaluation.sample_tokens": 0, "checkpoint.export": "false", "checkpoint.keep": 1,
    }  # fmt: skip
    return rung.fields | tasks | fields


def trunk_fields(target: Config, rung: Rung) -> dict[str, Any]:
    """Returns the fields of a trunk, which keeps a checkpoint for each branch."""
    kept = {"checkpoint.keep_every_steps": rung.branches[0][0], "optimizer.decay_fraction": 0.0}
    return common_fields(target, rung, rung.trunk_steps) | kept


def branch_fields(target: Config, rung: Rung, begin: int, end: int) -> dict[str, Any]:
    """Returns the fields of a branch that decays from step `begin` to `end`."""
    decay = {"checkpoint.keep_every_steps": None, "optimizer.decay_fraction": (end - begin) / end}
    return common_fields(target, rung, end) | decay


def check_folder(ladder: Ladder) -> None:
    """Raises InputError where the folder holds runs of another ladder, or others that are in the way."""
    file = ladder.folder / LADDER_FILE
    if file.exists() and any(planned.run.config_file.exists() for planned in ladder.runs):
        saved = read_json(file, "restore it, or name another folder with --to").get("identity", {})
        if changed := changes(saved, ladder.identity):
            raise InputError(
                f"{ladder.folder} holds another ladder:\n{table(changed)}\n"
                "  give the values from before, or name another folder with --to=FOLDER"
            )
    if problems := folder_problems(ladder.runs):
        raise InputError("\n".join(problems))


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Returns the flags, and the fields that may not change freely, in which two identities of ladders differ."""
    before, after = saved.get("flags", {}), now["flags"]
    changed = [
        Change(f"--{name.replace('_', '-')}", f"{before.get(name, math.nan):g}", f"{value:g}")
        for name, value in after.items()
        if before.get(name) != value
    ]
    for group, name, field in config_fields():
        old, new = (identity.get("config", {}).get(group, {}).get(name) for identity in (saved, now))
        if old != new and (field.metadata["resume"] != "free" or (group, name) == ("data", "corpus")):
            changed.append(Change(f"{group}.{name}", old, new))
    return changed


def step_seconds(ladder: Ladder) -> list[float]:
    """Returns the seconds of a step of each rung, from an earlier call or measured now, and keeps them.

    Raises InputError with the rungs that do not fit the devices.
    """
    file = ladder.folder / LADDER_FILE
    saved = read_json(file, "remove it, and steps are timed again") if file.exists() else {}
    seconds = saved.get("step_seconds")
    is_same = not changes(saved.get("identity", {}), ladder.identity)
    is_good = isinstance(seconds, list) and all(isinstance(s, float) and 0 < s < math.inf for s in seconds)
    if is_same and is_good and seconds is not None and len(seconds) == len(ladder.rungs):
        return seconds
    timed = time_steps({f"rung-{number}": trunk.config for number, trunk in enumerate(ladder.trunks, 1)})
    save(ladder, list(timed.values()))
    return list(timed.values())


def save(ladder: Ladder, seconds: list[float] | None = None) -> None:
    """Writes what makes this ladder known again to its folder, with the seconds of the steps if they are new."""
    file = ladder.folder / LADDER_FILE
    ladder.folder.mkdir(parents=True, exist_ok=True)
    if seconds is None and file.exists():
        seconds = read_json(file, "remove it").get("step_seconds")
    with atomic_file(file) as partial:
        partial.write_text(json.dumps({"identity": ladder.identity, "step_seconds": seconds}) + "\n")


def read_points(ladder: Ladder) -> list[Point]:
    """Returns the points of finished branches. InputError where a run diverged, ended early, or has other text."""
    points, problems, texts = [], [], set()
    for rung, of_rung in zip(ladder.rungs, ladder.branches, strict=True):
        for (_, end), branch in zip(rung.branches, of_rung, strict=True):
            outcome, config = outcome_of(branch.run), branch.run.load_config().resolved()
            texts.add(tuple(branch.run.held_out_texts()))
            if outcome.tokens != end * rung.step_tokens:
                problems.append(
                    f"{branch.name} ended after {outcome.tokens:,} of its {end * rung.step_tokens:,} tokens, where its "
                    "corpus ended; raise data.epochs, or give more text"
                )
            elif not math.isfinite(outcome.bits):
                problems.append(
                    f"{branch.name} diverged: its held-out loss is not finite; lower optimizer.learning_rate, and name "
                    "another folder with --to=FOLDER"
                )
            N = flops_per_token(config.model, config.data.segment_length) / 6
            points.append(Point(branch.name, N, float(outcome.tokens), outcome.bits))
    if problems:
        raise InputError("\n".join(problems))
    if len(texts) > 1:
        raise InputError(
            f"the runs in {ladder.folder} were evaluated on different documents, as their corpus has changed; "
            "name another folder with --to=FOLDER"
        )
    return points


def measure(ladder: Ladder, budget: Budget) -> Result:
    """Returns what the finished runs say. Raises InputError as `read_points` does."""
    if problems := folder_problems(ladder.runs):
        raise InputError("\n".join(problems))
    points = read_points(ladder)
    vocab_size = ladder.trunks[0].run.load_config().model.vocab_size
    model = ladder.target.model.resolved(vocab_size, ladder.target.data.segment_length)
    N, D = flops_per_token(model, ladder.target.data.segment_length) / 6, float(ladder.target_tokens)
    fit = fit_points(points)
    best = Best(
        fit.interval(lambda law: law.best(budget.flops)[0]),
        fit.interval(lambda law: law.best(budget.flops)[1]),
        fit.predict(*fit.law.best(budget.flops)),
    )
    return Result(points, fit, held_back(points), N, D, fit.predict(N, D), budget, best)


def fit_points(points: list[Point], **options: int) -> Fit:
    """Returns the law of points."""
    N, D, bits = (np.array([getattr(point, name) for point in points]) for name in ("N", "D", "bits"))
    return fit_law(N, D, bits, **options)


def held_back(points: list[Point]) -> list[HeldBack]:
    """Returns predictions for the points of the largest rung from those of the others, if they are enough."""
    largest = max(point.N for point in points)
    others = [point for point in points if largest != point.N]
    if len({point.N for point in others}) < LEAST_SIZES:
        return []
    law = fit_points(others, resamples=0).law
    return [HeldBack(point, law.loss(point.N, point.D)) for point in points if largest == point.N]
