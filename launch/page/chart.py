"""Charts of what was measured at each step, as SVG. All have the same steps, thinned to what can be seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.page.markup import Html, element

# Size of a chart and edges of its plot, in units of about a phone's pixels.
WIDTH, HEIGHT = 400, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 394, 8, 156
# Prefixes of large numbers on an axis.
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
# Columns of pixels to which the points of a chart are thinned.
MAX_COLUMNS = 320
# Most points that are drawn as dots.
MAX_DOTS = 40
# Most marks of one kind that are drawn through the whole chart.
MAX_LONG_MARKS = 30
MAX_TASK_CHARTS = 24
# Steps of an axis, times a power of ten.
ROUND = (1, 2, 5, 10)


@dataclass(frozen=True)
class Measure:
    """A quantity of metrics.jsonl that has a chart, smoothed where its values jump from step to step."""

    field: str
    title: str
    unit: str
    text: Callable[[float], str]  # formats a value for people
    factor: float = 1.0  # multiplies the values on the axis
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
# Of objectives that compare answers.
PAIR_MEASURES = (
    Measure("accuracy", "Accuracy", "% of pairs", "{:.1f}%".format, 100, is_smoothed=True),
    Measure("margin", "Margin", "of the rewards", "{:.3f}".format, is_smoothed=True),
    Measure("validation_preference_accuracy", "Held-out accuracy", "% of pairs", "{:.1f}%".format, 100),
)
# Of objectives with sampled answers.
SAMPLE_MEASURES = (
    Measure("reward", "Reward", "of sampled answers", "{:.3f}".format, is_smoothed=True),
    Measure("validation_reward", "Held-out reward", "of the most likely answers", "{:.3f}".format),
    Measure("kl", "KL divergence", "nats a token, to the reference", "{:.4g}".format, from_zero=True, is_smoothed=True),
    Measure("answer_length", "Length", "tokens an answer", "{:.1f}".format, from_zero=True, is_smoothed=True),
    Measure("entropy", "Entropy", "nats a token", "{:.3f}".format, from_zero=True, is_smoothed=True),
    Measure("equal_groups", "Equal rewards", "% of prompts", "{:.1f}%".format, 100, from_zero=True, is_smoothed=True),
)
# Of mixtures of experts.
EXPERT_MEASURES = (
    Measure("expert_load_most", "Fullest expert", "tokens over the mean", "{:.2f}".format, is_smoothed=True),
    Measure("dead_experts", "Experts without a token", "in all layers", "{:,.0f}".format, from_zero=True),
)


def task_measures(records: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Returns a measure for each field `tasks/TASK/METRIC` of the records, MAX_TASK_CHARTS at most."""
    fields = dict.fromkeys(name for record in records for name in record if name.startswith("tasks/"))
    measures = []
    for field in list(fields)[:MAX_TASK_CHARTS]:
        task, _, metric = field.removeprefix("tasks/").rpartition("/")
        measures.append(Measure(field, task, metric, "{:.4g}".format))
    return measures


@dataclass(frozen=True)
class Chart:
    """The figure of a measure, and the texts of its values for the page's script: `values` at `steps`."""

    figure: Html
    steps: list[int]
    values: list[str]


@dataclass(frozen=True)
class Axes:
    """Maps steps from `first` to `last` and values from `low` to `high` to the plot."""

    first: int
    last: int
    low: float
    high: float

    def x(self, step: float) -> float:
        """Returns a step's distance from the left edge of the chart."""
        return LEFT + (RIGHT - LEFT) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Returns a value's distance from the top edge; values outside the axis are drawn at its end."""
        return BOTTOM - (BOTTOM - TOP) * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def drawing(self) -> list[Html]:
        """Returns grid lines at round values, and the labels of both axes."""
        values, steps = ticks(self.low, self.high), ticks(self.first, self.last, 5)
        anchors = {self.first: "start", self.last: "end"}
        return [
            element("path", class_="grid", d="".join(f"M{LEFT} {self.y(value):.1f}H{RIGHT}" for value in values)),
            *(
                element("text", text, x=LEFT - 6, y=f"{self.y(value) + 4:.1f}", text_anchor="end")
                for value, text in zip(values, axis_labels(values), strict=True)
            ),
            *(
                element("text", text, class_="step", x=f"{self.x(step):.1f}", y=BOTTOM + 17,
                        text_anchor=anchors.get(int(step), "middle"))
                for step, text in zip(steps, axis_labels(steps), strict=True)
                if step == int(step) and (step == self.last or self.x(step) < RIGHT - 20)
            ),
        ]  # fmt: skip


def make_chart(
    measure: Measure, records: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[int]], placeholder: str
) -> Chart | None:
    """Returns the chart of a measure; where no step has it, a placeholder with this text, or None if that is empty.

    `marks` are the steps of events, by the class of their marks.
    """
    points = [(record["step"], record[measure.field]) for record in records if record.get(measure.field) is not None]
    if not points:
        empty = element("figure", caption(measure, [], ""), element("div", placeholder, class_="none"))
        return Chart(empty, [], []) if placeholder else None
    x = np.array([step for step, _ in points])
    y = np.array([value for _, value in points], float) * measure.factor
    finite = y[np.isfinite(y)]
    axes = Axes(*step_range(records), *value_range(finite, measure.from_zero))
    ends, kept = thinned(x, y)
    line = curve(axes, x[kept], y[kept])
    if len(x) <= MAX_DOTS:
        curves = {"line": line, "dots": curve(axes, x, y, is_line=False)}
    elif measure.is_smoothed:
        curves = {"raw": line, "line": curve(axes, x[ends], smooth(y)[ends])}
    else:
        curves = {"line": line}
    notes = [f"{len(y) - len(finite):,} not finite"] if len(finite) < len(y) else []
    if len(finite) and finite.max() > axes.high:
        notes.append(f"highest {measure.text(float(finite.max()))}")
    values = [measure.text(value) for value in y[ends].tolist()]
    paths = [
        *(element("path", class_=f"mark {name}", d=mark_path(axes, name, steps)) for name, steps in marks.items()),
        *(element("path", class_=name, d=path) for name, path in curves.items()),
    ]
    ends_text = f"{measure.text(float(y[0]))} at step {x[0]:,}, {values[-1]} at step {x[-1]:,}"
    svg = drawn_with_cursor(axes, paths, f"{measure.title}: {ends_text}")
    figure = element("figure", caption(measure, notes, values[-1]), svg, data_chart=measure.field)
    return Chart(figure, x[ends].tolist(), values)


def drawn_with_cursor(axes: Axes, paths: Sequence[Html], label: str) -> Html:
    """Returns a drawing of curves with axes, and with the cursor that charts.js puts under the pointer."""
    return element(
        "svg",
        *axes.drawing(),
        *paths,
        element("path", class_="cursor", d=""),
        element("text", class_="when", x=LEFT, y=BOTTOM + 17, text_anchor="middle"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
    )


def step_range(records: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Returns the first and last step of all charts; the first is before the run's own, 0 unless it is a fork."""
    return records[0]["step"] - 1, records[-1]["step"]


def caption(measure: Measure, notes: Sequence[str], value: str) -> Html:
    """Returns the title of a chart and the value at the pointer, which at first is the last one."""
    title = element("span", measure.title, " ", element("small", "; ".join(filter(None, [measure.unit, *notes]))))
    return element("figcaption", title, element("output", value))


def value_range(values: np.ndarray, from_zero: bool) -> tuple[float, float]:
    """Returns the ends of the axis of finite values. A few outliers above all others don't stretch it."""
    if not len(values):
        return 0.0, 1.0
    low = 0.0 if from_zero else float(values.min())
    usual, high = float(np.quantile(values, 0.995)), float(values.max())
    if len(values) > MAX_DOTS and high > usual + (usual - low):
        high = usual + 0.1 * (usual - low)
    room = 0.05 * (high - low) or abs(high) / 2 or 0.5
    return low if from_zero else low - room, high + room


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of the last point of each pixel column, and of these with each column's lowest and highest."""
    pixel = (x - x[0]) * MAX_COLUMNS // (x[-1] - x[0] + 1)
    ends = np.flatnonzero(np.diff(pixel, append=pixel[-1] + 1))
    kept = set(ends)
    for column in np.split(np.arange(len(x)), ends + 1):
        finite = column[np.isfinite(y[column])]
        if len(finite):
            kept |= {finite[y[finite].argmin()], finite[y[finite].argmax()]}
    return ends, np.array(sorted(kept))


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns an exponential mean over about a hundredth of the points, corrected for its start at 0."""
    keep = math.exp(-100 / len(values))
    total = weight = 0.0
    means = []
    for value in values.tolist():
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return np.array(means)


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, is_line: bool = True) -> str:
    """Returns the SVG path through points, interrupted at values that are not finite; or the path of dots alone."""
    commands = []
    pen = "M"
    for step, value in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(value):
            commands.append(f"{pen}{axes.x(step):.1f} {axes.y(value):.1f}{'' if is_line else 'h0'}")
        pen = "L" if is_line and math.isfinite(value) else "M"
    return "".join(commands)


def mark_path(axes: Axes, name: str, steps: Sequence[int]) -> str:
    """Returns the SVG path of an event's marks: saves below the axis, others through the chart or, if many, short."""
    places = sorted({round(axes.x(step)) for step in steps if axes.first <= step <= axes.last})
    top, bottom = TOP, TOP + 5 if len(places) > MAX_LONG_MARKS else BOTTOM
    if name == "save":
        top, bottom = BOTTOM, BOTTOM + 4
    return "".join(f"M{x} {top}V{bottom}" for x in places)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`, and two at least where these differ."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    place = next(i for i, factor in enumerate(ROUND) if factor * size >= rough * 0.999)
    for factor in reversed(ROUND[: place + 1]):
        step = factor * size
        found = [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(found) > 1:
            break
    return found


def axis_labels(values: Sequence[float]) -> list[str]:
    """Returns texts for the numbers of an axis, as short as keeps them distinct."""
    largest = max(map(abs, values), default=0.0)
    factor, prefix = next(((factor, prefix) for factor, prefix in PREFIXES if largest > 5 * factor), (1.0, ""))
    texts = ([f"{value / factor:.{digits}g}{prefix if value else ''}" for value in values] for digits in range(4, 17))
    return [text.replace("e-0", "e-") for text in next(labels for labels in texts if len(set(labels)) == len(labels))]
