"""The result of an experiment as a table with notes, for a terminal and for a page, and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.columns import columns
from launch.experiment import NOTHING, TIME, TOKENS, Experiment
from train.run.comparison import CONFIDENCE, Figures, deviation

IN_COMMON = {
    TOKENS: "all variants read the same number of tokens",
    TIME: "the steps of each variant take as long as the baseline's, so it has a number of its own",
    NOTHING: "variants may differ in tokens and in time",
}


@dataclass(frozen=True)
class Compared:
    """The result of an experiment.

    Attributes:
        in_turns: whether steps were timed in turns in one process; if not, by each run's own log.
        same_texts: whether all runs of a seed evaluated the same documents.
        failed: exit statuses of runs that did not come to their end, by name; `figures` lacks their variants.
    """

    experiment: Experiment
    figures: dict[str, Figures]
    in_turns: bool
    same_texts: bool
    failed: dict[str, int] = field(default_factory=dict)


def table_rows(figures: Mapping[str, Figures], experiment: Experiment) -> list[Sequence[str]]:
    """Returns a title row, and a row for each variant."""
    title = ("variant", "bits a byte", "loss", f"next to {experiment.baseline}", "more than the seeds'",
             "tokens to its end", "time", "a step")  # fmt: skip
    rows: list[Sequence[str]] = [title]
    for name in experiment.configs:
        if (of := figures.get(name)) is None:
            rows.append((name, *["n/a"] * (len(title) - 1)))
            continue
        is_left_out = name != experiment.baseline and not of.difference
        difference, is_clear = ("n/a", "n/a") if is_left_out else ("", "")
        if of.difference:
            margin = of.difference.margin
            difference = f"{of.difference.mean:+.4f}" + ("" if margin is None else f" ± {margin:.4f}")
            is_clear = "one seed" if margin is None else "yes" if of.difference.is_clear else "no"
            is_clear += "" if of.difference.p_value is None else f", p = {of.difference.p_value:.2g}"
        tokens, time = "n/a", "n/a"
        if of.tokens_ratio is not None and of.time_ratio is not None:
            needed = np.mean([number for number in of.tokens_needed if number is not None])
            tokens, time = f"{needed:,.0f} ({of.tokens_ratio:.0%})", f"{of.time_ratio:.0%}"
        rows.append((name, spread(of.bits), spread(of.loss), difference, is_clear, tokens, time,
                     f"{of.step_seconds:.4f} s"))  # fmt: skip
    return rows


def spread(values: Sequence[float]) -> str:
    """Returns mean ± deviation; the value alone where there is only one."""
    over_seeds = deviation(values)
    return f"{np.mean(values):.4f}" + ("" if over_seeds is None else f" ± {over_seeds:.4f}")


def comparison_text(compared: Compared) -> str:
    """Returns the table and its notes."""
    rows = table_rows(compared.figures, compared.experiment)
    return "\n".join([columns(rows, right=range(1, 8)), "", *notes(compared)])


def notes(compared: Compared) -> list[str]:
    """Returns what the columns mean, one line each, and what makes them doubtful."""
    experiment = compared.experiment
    count, baseline = len(experiment.seeds), experiment.baseline
    lines = ["bits a byte, loss: of held-out text at the end"]
    if count > 1:
        lines[0] += f", mean ± standard deviation over {count} seeds"
        lines.append(
            f"next to {baseline}: mean difference seed by seed, ± half of its {CONFIDENCE:.0%} interval (paired t-test)"
        )
        lines.append("more than the seeds': that interval leaves out 0; each variant is tested by itself")
    lines.append(
        f"tokens, time: until evaluations come down to the last one of {baseline} with the same seed; a whole run of "
        "that length does better"
    )
    timed = "the fastest of several turns in one process" if compared.in_turns else "by the runs' own logs"
    lines += [f"a step: {timed}", IN_COMMON[experiment.equal]]
    for name, status in compared.failed.items():
        lines.append(f"n/a: {name} ended with status {status}; the same command goes on from there")
    if not compared.same_texts:
        lines.append("doubtful: the variants were evaluated on different documents, as their data differs")
    return lines


def as_json(compared: Compared) -> dict[str, Any]:
    """Returns the figures as JSON can hold them: null where one is not finite or known, and for a failed variant."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inside) for name, inside in value.items()}
        if isinstance(value, list):
            return [finite(inside) for inside in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    experiment = compared.experiment
    variants: dict[str, Any] = dict.fromkeys(experiment.configs)
    for name, of in compared.figures.items():
        difference = of.difference and {**of.difference._asdict(), "is_clear": of.difference.is_clear}
        variants[name] = {
            "bits_per_byte": of.bits, "bits_per_byte_mean": sum(of.bits) / len(of.bits),
            "bits_per_byte_deviation": deviation(of.bits), "loss": of.loss, "loss_mean": sum(of.loss) / len(of.loss),
            "loss_deviation": deviation(of.loss), "tokens": of.tokens, "step_seconds": of.step_seconds,
            "tokens_needed": of.tokens_needed, "tokens_ratio": of.tokens_ratio, "time_ratio": of.time_ratio,
            "difference": difference,
        }  # fmt: skip
    head: dict[str, Any] = {"baseline": experiment.baseline, "seeds": list(experiment.seeds), "equal": experiment.equal}
    timed = "turns" if compared.in_turns else "runs"
    head |= {"timed_in": timed, "same_held_out": compared.same_texts, "failed": compared.failed}
    return finite(head | {"variants": variants})  # type: ignore[no-any-return]
