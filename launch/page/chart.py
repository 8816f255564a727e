"""Charts of what was measured at each step, as SVG: all over the same steps, thinned to what can be seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.page.markup import Html, tag

# Of the drawing, in its own units: about a phone's pixels.
WIDTH, HEIGHT = 400, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 394, 8, 156
# Of large numbers on an axis.
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
# Points side by side, at most.
COLUMNS = 320
# Points that are few enough to be drawn as such.
FEW = 40
# Marks of one kind that are too many to go through a chart.
MANY = 30


@dataclass(frozen=True)
class Measure:
    """What a chart shows.

    Attributes:
        field: of metrics.jsonl.
        title: above the chart.
        unit: beside it.
        text: a value as a person reads it.
        factor: from the field's unit to the axis's.
        from_zero: the axis begins there.
        is_smoothed: it jumps from step to step, so a mean stands before it.
    """

    field: str
    title: str
    unit: str
    text: Callable[[float], str]
    factor: float = 1.0
    from_zero: bool = False
    is_smoothed: bool = False


MEASURES = (
    Measure("loss", "Training loss", "nats a token", "{:.4f}".format, is_smoothed=True),
    Measure("validation_bits_per_byte", "Held-out text", "bits a byte", "{:.3f}".format),
    Measure("learning_rate", "Learning rate", "", "{:.3g}".format, from_zero=True),
    Measure("grad_norm", "Gradient norm", "before clipping", "{:.3g}".format, is_smoothed=True),
    Measure("tokens_per_second", "Throughput", "tokens a second", "{:,.0f}".format, from_zero=True, is_smoothed=True),
    Measure("peak_share", "Share of the peak", "% of FLOP/s", "{:.1f}%".format, 100, True, is_smoothed=True),
    Measure("data_wait_seconds", "Data wait", "seconds a step", "{:.3f} s".format, from_zero=True, is_smoothed=True),
    Measure("memory_bytes", "Memory", "GiB, the most so far", "{:.2f} GiB".format, 2**-30, from_zero=True),
    Measure("utilization", "Utilisation", "% of positions trained on", "{:.1f}%".format, 100, True, is_smoothed=True),
)
# Charts of tasks, at most: a group may have very many.
TASK_CHARTS = 24


def task_measures(records: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """One for each metric of each task that `records` have as a field `tasks/TASK/METRIC`."""
    fields = dict.fromkeys(name for record in records for name in record if name.startswith("tasks/"))
    found = []
    for field in list(fields)[:TASK_CHARTS]:
        task, _, metric = field.removeprefix("tasks/").rpartition("/")
        found.append(Measure(field, task, metric, "{:.4g}".format))
    return found


@dataclass(frozen=True)
class Chart:
    """A measure's figure, and what its readout says: `values` at `steps`."""

    figure: Html
    steps: list[int]
    values: list[str]


@dataclass(frozen=True)
class Axes:
    """Where a step from `first` to `last` and a value from `low` to `high` stand in the drawing."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        """From the left."""
        return LEFT + (RIGHT - LEFT) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """From the top; what is beyond an end stands at it."""
        return BOTTOM - (BOTTOM - TOP) * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def drawing(self) -> list[Html]:
        """Lines at round values, and the numbers of both axes."""
        values, steps = ticks(self.low, self.high), ticks(self.first, self.last, 5)
        return [
            tag("path", class_="grid", d="".join(f"M{LEFT} {self.y(value):.1f}H{RIGHT}" for value in values)),
            *(
                tag("text", text, x=LEFT - 6, y=f"{self.y(value) + 4:.1f}", text_anchor="end")
                for value, text in zip(values, numbers(values), strict=True)
            ),
            *(
                tag("text", text, class_="step", x=f"{self.x(step):.1f}", y=BOTTOM + 17,
                    text_anchor="start" if step == self.first else "end" if step == self.last else "middle")
                for step, text in zip(steps, numbers(steps), strict=True)
                if step == int(step) and (step == self.last or self.x(step) < RIGHT - 20)
            ),
        ]  # fmt: skip


def draw(
    measure: Measure, records: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[int]], missing: str
) -> Chart | None:
    """The chart of a measure; none where no step has it.

    Args:
        measure: what is shown.
        records: of metrics.jsonl, by step.
        marks: steps of events, by the class of their marks.
        missing: what stands in the place of a chart whose measure some step will have.
    """
    found = [(record["step"], record[measure.field]) for record in records if measure.field in record]
    if not found:
        none = tag("figure", caption(measure, [], ""), tag("div", missing, class_="none"))
        return Chart(none, [], []) if missing else None
    x = np.array([step for step, _ in found])
    y = np.array([value for _, value in found], float) * measure.factor
    finite = y[np.isfinite(y)]
    axes = Axes(*between(records), *limits(finite, measure.from_zero))
    ends, kept = columns(x, y)
    curves = [tag("path", class_="line", d=curve(axes, x[kept], y[kept]))]
    if len(x) <= FEW:
        curves.append(tag("path", class_="dots", d=curve(axes, x, y, is_line=False)))
    elif measure.is_smoothed:
        curves = [
            tag("path", class_="raw", d=curve(axes, x[kept], y[kept])),
            tag("path", class_="line", d=curve(axes, x[ends], smooth(y)[ends])),
        ]
    notes = [f"{len(y) - len(finite):,} not finite"] if len(finite) < len(y) else []
    if len(finite) and finite.max() > axes.high:
        notes.append(f"highest {measure.text(float(finite.max()))}")
    values = [measure.text(value) for value in y[ends].tolist()]
    svg = tag(
        "svg",
        *axes.drawing(),
        *(tag("path", class_=f"mark {name}", d=marked(axes, name, steps)) for name, steps in marks.items()),
        *curves,
        tag("path", class_="cursor", d=""),
        tag("text", class_="when", x=LEFT, y=BOTTOM + 17, text_anchor="middle"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{measure.title}: {measure.text(float(y[0]))} at step {x[0]:,}, {values[-1]} at step {x[-1]:,}",
    )
    return Chart(
        tag("figure", caption(measure, notes, values[-1]), svg, data_chart=measure.field), x[ends].tolist(), values
    )


def between(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The steps that the charts begin and end with: from before the first one, which of a fork is not step 1."""
    return records[0]["step"] - 1, records[-1]["step"]


def caption(measure: Measure, notes: Sequence[str], value: str) -> Html:
    """Above a chart: what it shows, and the value where the pointer is, at first the last one."""
    title = tag("span", measure.title, " ", tag("small", "; ".join(filter(None, [measure.unit, *notes]))))
    return tag("figcaption", title, tag("output", value))


def limits(values: np.ndarray, from_zero: bool) -> tuple[float, float]:
    """The ends of the axis. A few values far above all others end at its upper end."""
    if not len(values):
        return 0.0, 1.0
    low, usual, high = 0.0 if from_zero else float(values.min()), float(np.quantile(values, 0.995)), float(values.max())
    if len(values) > FEW and high > usual + (usual - low):
        high = usual + 0.1 * (usual - low)
    room = 0.05 * (high - low) or abs(high) / 2 or 0.5
    return low if from_zero else low - room, high + room


def columns(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the last point of each column of the drawing, and of these with its lowest and highest."""
    column = (x - x[0]) * COLUMNS // (x[-1] - x[0] + 1)
    ends = np.flatnonzero(np.diff(column, append=column[-1] + 1))
    kept, begin = set(ends.tolist()), 0
    for end in (ends + 1).tolist():
        part = y[begin:end]
        if np.isfinite(part).any():
            part = np.where(np.isfinite(part), part, np.nan)
            kept |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
        begin = end
    return ends, np.array(sorted(kept))


def smooth(values: np.ndarray) -> np.ndarray:
    """An exponential mean over about a hundredth of the points, without the bias of its beginning."""
    keep = math.exp(-100 / len(values))
    total, weight, found = 0.0, 0.0, []
    for value in values.tolist():
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight if weight else math.nan)
    return np.array(found)


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, is_line: bool = True) -> str:
    """The path through these points, broken where one is not finite; or the points alone."""
    found, pen = [], "M"
    for step, value in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(value):
            found.append(f"{pen}{axes.x(step):.1f} {axes.y(value):.1f}{'' if is_line else 'h0'}")
        pen = "L" if is_line and math.isfinite(value) else "M"
    return "".join(found)


def marked(axes: Axes, name: str, steps: Sequence[int]) -> str:
    """The path of an event's marks: a save's are below the axis; others go through the chart, or are many and short."""
    where = sorted({round(axes.x(step)) for step in steps if axes.first <= step <= axes.last})
    top, bottom = (BOTTOM, BOTTOM + 4) if name == "save" else (TOP, TOP + 5 if len(where) > MANY else BOTTOM)
    return "".join(f"M{x} {top}V{bottom}" for x in where)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if step >= rough * 0.999)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def numbers(values: Sequence[float]) -> list[str]:
    """Short texts for the numbers of an axis, each another."""
    factor, unit = next(((f, u) for f, u in UNITS if max(map(abs, values), default=0.0) > 5 * f), (1.0, ""))
    texts = ([f"{value / factor:.{digits}g}{unit if value else ''}" for value in values] for digits in range(4, 17))
    return [text.replace("e-0", "e-") for text in next(t for t in texts if len(set(t)) == len(t))]
