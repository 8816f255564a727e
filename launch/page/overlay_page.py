"""The page of several runs: their curves over each other, by the tokens that they have read."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.page.chart import (
    BOTTOM,
    EXPERT_MEASURES,
    LEFT,
    MAX_DOTS,
    MEASURES,
    RIGHT,
    TOP,
    Axes,
    Measure,
    curve,
    drawn_with_cursor,
    smooth,
    task_measures,
    thinned,
    value_range,
)
from launch.page.markup import Html, element, fragment, html_page
from launch.page.report_page import GENERATOR, section, setting_text
from train.config.config import Config, config_fields, public
from train.run.comparison import tokens_after
from train.run.folder import Run
from train.run.step_log import held_out_figure, read_metrics, scalars

# Colours of groups in overlay.css; further groups have the same ones, dashed.
COLORS = 8
# Fields in which any two runs differ.
EACH_ITS_OWN = ("train.run_dir", "train.seed")


class Series:
    """The log of one run: its records, and the tokens that were read up to each."""

    def __init__(self, run: Run):
        self.config: Config = public(run.load_config())
        self.records = [r | dict(scalars({"tasks": r.get("tasks", {})})) for r in read_metrics(run.metrics)]
        self.tokens = [tokens_after(self.config, record["step"]) for record in self.records]

    def points(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and values, smoothed and thinned, of the steps that have a measure."""
        known = [(x, r[measure.field]) for x, r in zip(self.tokens, self.records, strict=True)
                 if r.get(measure.field) is not None]  # fmt: skip
        x, y = np.array([x for x, _ in known]), np.array([y for _, y in known], float) * measure.factor
        if len(x) <= MAX_DOTS:
            return x, y
        ends, kept = thinned(x, y)
        return (x[ends], smooth(y)[ends]) if measure.is_smoothed else (x[kept], y[kept])


def make_overlay_page(
    title: str, groups: Mapping[str, Sequence[Run]], rows: Sequence[Sequence[str]] = (), notes: Sequence[str] = ()
) -> str:
    """Returns the whole page of groups of runs, each group in one colour.

    Raises InputError where a folder is no run.

    Args:
        rows: those of the table above the charts, its titles first; by default the last figures of each group.
        notes: lines of text below that table.
    """
    series = {name: [Series(run) for run in runs] for name, runs in groups.items()}
    everything = [one for of_group in series.values() for one in of_group]
    records = [record for one in everything for record in one.records]
    drawn, data, between = [], {}, (0, 1)
    if records:
        begin = min(tokens_after(one.config, one.records[0]["step"] - 1) for one in everything if one.records)
        between = (begin, max(x for one in everything for x in one.tokens))
        for measure in (*MEASURES, *EXPERT_MEASURES, *task_measures(records)):
            if any(measure.field in record for record in records):
                figure, data[measure.field] = overlay_chart(measure, series, between)
                drawn.append(figure)
    parts = [
        element("header", element("h1", title), legend(series)),
        section(
            "Results",
            element("div", table(rows or last_figures(series)), class_="scrolls"),
            *(element("p", note, class_="quiet") for note in notes),
        ),
        section("Over tokens", element("div", *drawn, class_="charts")) if drawn else None,
        section("What differs", element("div", differences(series), class_="scrolls")),
    ]
    script = (
        {"edges": [LEFT, RIGHT], "top": TOP, "bottom": BOTTOM, "between": between, "charts": data} if data else None
    )
    return html_page(title, GENERATOR, fragment(parts), script, "overlay", has_cursors=True)


def class_of(group: int) -> str:
    """Returns the classes of a group's colour and dashes."""
    return f"hue{group % COLORS}" + " dashed" * (group >= COLORS)


def legend(series: Mapping[str, Sequence[Series]]) -> Html:
    """Returns the names of the groups in their colours."""
    names = []
    for i, (name, of_group) in enumerate(series.items()):
        number = element("small", f" {len(of_group)} runs") if len(of_group) > 1 else None
        names.append(element("span", element("i", class_=class_of(i)), name, number))
    return element("p", *names, class_="groups")


def overlay_chart(
    measure: Measure, series: Mapping[str, Sequence[Series]], between: tuple[int, int]
) -> tuple[Html, list[dict[str, Any]]]:
    """Returns the figure of a measure, and its points for the page's script: one entry a line."""
    lines = [(i, len(of) > 1, one.points(measure)) for i, of in enumerate(series.values()) for one in of]
    lines = [line for line in lines if len(line[2][0])]
    values = np.concatenate([y for *_, (_, y) in lines])
    axes = Axes(*between, *value_range(values[np.isfinite(values)], measure.from_zero))
    paths = []
    for group, is_thin, (x, y) in lines:
        classes = f"over {class_of(group)}" + " thin" * is_thin
        paths.append(element("path", class_=classes, d=curve(axes, x, y)))
        if len(x) <= MAX_DOTS:
            paths.append(element("path", class_=f"{classes} point", d=curve(axes, x, y, is_line=False)))
    svg = drawn_with_cursor(axes, paths, f"{measure.title} of {len(lines)} runs")
    outputs = (element("output", "", class_=class_of(i), data_group=i) for i in sorted({group for group, *_ in lines}))
    title = element("span", measure.title, " ", element("small", measure.unit))
    caption = element("figcaption", title, element("span", *outputs))
    points = [
        {"group": group, "x": x.tolist(), "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in y.tolist()]}
        for group, _, (x, y) in lines
    ]
    return element("figure", caption, svg, data_chart=measure.field), points


def last_figures(series: Mapping[str, Sequence[Series]]) -> list[Sequence[str]]:
    """Returns rows with the steps of each group's first run, and the mean of the last held-out figures of all."""
    rows: list[Sequence[str]] = [("run", "step", "tokens", "bits a byte held out", "loss held out")]
    for name, of_group in series.items():
        evaluated = [r for one in of_group for r in [r for r in one.records if "validation_loss" in r][-1:]]
        means = [statistics.mean(held_out_figure(r, figure) for r in evaluated) if evaluated else math.nan
                 for figure in ("bits_per_byte", "loss")]  # fmt: skip
        step, tokens = (of_group[0].records[-1]["step"], of_group[0].tokens[-1]) if of_group[0].records else (0, 0)
        rows.append((name, f"{step:,}", f"{tokens:,}", *(f"{mean:.4f}" if evaluated else "" for mean in means)))
    return rows


def differences(series: Mapping[str, Sequence[Series]]) -> Html:
    """Returns a table of the settings that differ between groups, by the first run of each."""
    configs = [of_group[0].config for of_group in series.values()]
    rows: list[Sequence[Any]] = [("setting", *series)]
    for group, name, _ in config_fields():
        values = [setting_text(getattr(getattr(config, group), name)) for config in configs]
        if len(set(values)) > 1 and f"{group}.{name}" not in EACH_ITS_OWN:
            rows.append((fragment([group, ".", Html("<wbr>"), name]), *values))
    return table(rows) if len(rows) > 1 else element("p", "Nothing but folders and seeds.", class_="quiet")


def table(rows: Sequence[Sequence[Any]]) -> Html:
    """Returns a table whose first row is its titles."""
    head = element("tr", *(element("th", cell) for cell in rows[0]))
    return element("table", head, *(element("tr", *(element("td", cell) for cell in row)) for row in rows[1:]))
