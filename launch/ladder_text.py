"""The plan and the result of a ladder as text for a terminal and a page, and as JSON."""

import math
from collections.abc import Sequence
from typing import Any

from launch.columns import columns
from launch.ladder_runs import Ladder, Point, Result
from model.parameters import count_parameters
from train.planning.family import size_of
from train.planning.scaling import CONFIDENCE, Interval, Law
from train.run.goodput import duration

# Predictions this many times beyond the largest rung, or the longest run, are marked.
FAR = 30
# By this share of its loss a rung may learn more from a doubling of its tokens than from the one before, by chance.
SUDDEN = 0.01
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """Returns a number with three digits and a prefix, as in 12.6M; as a power of ten where there is no prefix."""
    value = float(f"{value:.3g}")
    if value >= 1e15:
        return f"{value:.2e}".replace("e+", "e")
    factor, prefix = next(((factor, prefix) for factor, prefix in PREFIXES if value >= factor), (1.0, ""))
    digits = max(0, 2 - math.floor(math.log10(value / factor))) if value > 0 else 0
    return f"{value / factor:.{digits}f}{prefix}"


def plan_rows(ladder: Ladder, seconds: Sequence[float]) -> list[Sequence[str]]:
    """Returns a title row, a row for each rung, and one for the target."""
    rows: list[Sequence[str]] = [("", "layers", "width", "heads", "parameters", "N", "rows", "rate", "tokens", "steps",
                                  "FLOPs", "time")]  # fmt: skip
    for number, (rung, trunk, of_step) in enumerate(zip(ladder.rungs, ladder.trunks, seconds, strict=True), 1):
        model, train = trunk.config.model, trunk.config.train
        tokens = [end * rung.step_tokens for _, end in rung.branches]
        rows.append((
            f"rung-{number}", str(model.num_layers), str(model.model_dim), str(model.num_heads), short(rung.parameters),
            short(rung.N), str(train.batch_size), f"{trunk.config.optimizer.learning_rate:.3g}",
            f"{short(tokens[0])} to {short(tokens[-1])}", f"{rung.steps:,}",
            short(6 * rung.N * rung.steps * rung.step_tokens), duration(rung.steps * of_step),
        ))  # fmt: skip
    model, train = ladder.target.model, ladder.target.train
    rows.append((
        "target", str(model.num_layers), str(model.model_dim), str(model.num_heads),
        short(count_parameters(model.resolved(ladder.target.tokenizer.vocab_size, ladder.target.data.segment_length))),
        short(size_of(ladder.target)),
        str(train.batch_size), f"{ladder.target.optimizer.learning_rate:.3g}", short(ladder.target_tokens),
        f"{train.num_steps:,}", short(ladder.target_flops), "",
    ))  # fmt: skip
    return rows


def plan_text(ladder: Ladder, seconds: Sequence[float]) -> str:
    """Returns the runs of a ladder and what they take."""
    total = sum(rung.steps * of_step for rung, of_step in zip(ladder.rungs, seconds, strict=True))
    number = len(ladder.runs)
    lengths = len(ladder.rungs[0].branches)
    return "\n".join([
        columns(plan_rows(ladder, seconds), right=range(1, 12)),
        f"{number} runs in {ladder.folder}: for each rung a trunk of constant rate, and {lengths} branches that decay",
        f"{short(ladder.flops)} FLOPs, {ladder.flops / ladder.target_flops:.1%} of the target's, in about "
        f"{duration(total)} of steps, one after the other; each run's start comes in addition",
    ])  # fmt: skip


def plan_json(ladder: Ladder, seconds: Sequence[float]) -> dict[str, Any]:
    """Returns the plan as JSON can hold it."""
    rungs = [
        {"N": rung.N, "parameters": rung.parameters, "tokens": [end * rung.step_tokens for _, end in rung.branches],
         "steps": rung.steps, "flops": 6 * rung.N * rung.steps * rung.step_tokens, "step_seconds": of_step,
         "fields": rung.fields}
        for rung, of_step in zip(ladder.rungs, seconds, strict=True)
    ]  # fmt: skip
    target = {"N": size_of(ladder.target), "tokens": ladder.target_tokens, "flops": ladder.target_flops}
    return {"rungs": rungs, "flops": ladder.flops, "target": target}


def point_rows(result: Result) -> list[Sequence[str]]:
    """Returns a title row, and a row for each point with its residual."""
    rows: list[Sequence[str]] = [("run", "N", "tokens", "bits a byte", "law", "residual")]
    for point in result.points:
        fitted = result.fit.law.loss(point.N, point.D)
        rows.append((point.run, short(point.N), short(point.D), f"{point.bits:.4f}", f"{fitted:.4f}",
                     f"{point.bits - fitted:+.4f}"))  # fmt: skip
    return rows


def law_rows(result: Result) -> list[Sequence[str]]:
    """Returns a title row, and a row for each parameter of the law with its interval."""
    rows: list[Sequence[str]] = [("L(N, D) = E + ((A/N^α)^(1/γ) + (B/D^β)^(1/γ))^γ", "", f"{CONFIDENCE:.0%} interval")]
    for name, sign in zip(Law._fields, ("E", "A", "B", "α", "β", "γ"), strict=True):
        value, low, high = result.fit.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
        rows.append((sign, f"{value:.4g}", f"{low:.4g} to {high:.4g}"))
    return rows


def between(interval: Interval) -> str:
    """Returns a size or a number of tokens with its interval."""
    return f"{short(interval.value)} ({short(interval.low)} to {short(interval.high)})"


def predictions(result: Result) -> list[str]:
    """Returns what the law predicts, one line each."""
    prediction, best, flops = result.prediction, result.best, 6 * result.N * result.D
    lines = []
    if result.held_back:
        errors = [held.predicted - held.point.bits for held in result.held_back]
        lines.append(
            f"check: without the largest rung, the law misses its {len(errors)} runs by "
            f"{', '.join(f'{error:+.4f}' for error in errors)} bits a byte"
        )
    lines.append(
        f"target: N = {short(result.N)}, {short(result.D)} tokens, {cost(result, flops)}: "
        f"{prediction.value:.4f} bits a byte ({prediction.low:.4f} to {prediction.high:.4f})"
    )
    budget = result.budget.flops
    lines.append(
        f"best for {cost(result, budget)}: N = {between(best.N)}, {between(best.D)} tokens: {best.bits.value:.4f} "
        f"bits a byte ({best.bits.low:.4f} to {best.bits.high:.4f})"
    )
    return lines


def cost(result: Result, flops: float) -> str:
    """Returns FLOPs in words, with the days and dollars that they take where a machine is known."""
    machine = result.budget.machine
    if machine is None:
        return f"{short(flops)} FLOPs"
    dollars = machine.dollars(flops)
    price = "" if dollars is None else f", ${dollars:,.2f}"
    return f"{short(flops)} FLOPs ({machine.days(flops):.3g} days on {machine.name} at {machine.mfu:.0%} MFU{price})"


def notes(result: Result) -> list[str]:
    """Returns what the figures mean, and what makes them doubtful, one line each."""
    lines = [
        "N: FLOPs of a token / 6, that is the parameters that it is multiplied with, and attention's products",
        f"bits a byte: of held-out text, after a decay; in brackets the {CONFIDENCE:.0%} interval, by a bootstrap over "
        "rungs and points",
    ]
    lines += [
        f"doubtful: {run} gains {drop:.3f} bits by its last doubling of tokens, after {before:.3f} by the one before: "
        "it learns something new, which no law of the runs before it foresees; give larger rungs, or longer runs"
        for run, before, drop in sudden(result.points)
    ]
    N, D = (max(getattr(point, name) for point in result.points) for name in ("N", "D"))
    for name, N_there, D_there in (
        ("the target", result.N, result.D), ("the best", result.best.N.value, result.best.D.value),
    ):  # fmt: skip
        lines.append(f"{name} has {N_there / N:.1f} times the N of the largest rung, and {D_there / D:.1f} times the "
                     "tokens of the longest run")  # fmt: skip
        if max(N_there / N, D_there / D) > FAR:
            lines.append(f"doubtful: {name} is far beyond all that was measured; train a larger rung")
    return lines


def sudden(points: Sequence[Point]) -> list[tuple[str, float, float]]:
    """Returns (run, drop before, drop) where a rung's loss falls faster with more tokens: by the law it slows, by 2^-β.

    Args:
        points: rung by rung, by tokens, whose numbers are a factor of 2 apart.
    """
    found = []
    for a, b, c in zip(points, points[1:], points[2:], strict=False):
        before, drop = a.bits - b.bits, b.bits - c.bits
        if a.N == c.N and drop - before > SUDDEN * c.bits:
            found.append((c.run, before, drop))
    return found


def result_text(result: Result) -> str:
    """Returns the points, the law and its predictions."""
    tables = [columns(point_rows(result), right=range(1, 6)), columns(law_rows(result), right=(1,))]
    return "\n\n".join([*tables, "\n".join(predictions(result)), "\n".join(notes(result))])


def as_json(result: Result) -> dict[str, Any]:
    """Returns the result as JSON can hold it."""
    law = result.fit.law
    machine = result.budget.machine
    cost = {
        name: {"days": machine.days(flops), "dollars": machine.dollars(flops)} if machine else None
        for name, flops in (("target", 6 * result.N * result.D), ("best", result.budget.flops))
    }
    return {
        "points": [point._asdict() | {"fitted": law.loss(point.N, point.D)} for point in result.points],
        "law": {name: result.fit.interval(lambda law, name=name: getattr(law, name))._asdict() for name in Law._fields},  # type: ignore[misc]
        "held_back": [held.point._asdict() | {"predicted": held.predicted} for held in result.held_back],
        "target": {"N": result.N, "D": result.D, "flops": 6 * result.N * result.D,
                   "bits": result.prediction._asdict(), "cost": cost["target"]},
        "best": {"flops": result.budget.flops, "cost": cost["best"]}
        | {name: interval._asdict() for name, interval in result.best._asdict().items()},
    }  # fmt: skip
