"""The page of a ladder: loss over tokens of each rung with the fitted law, its residuals, and what it predicts."""

import math
from collections.abc import Sequence

import numpy as np

from launch.ladder_runs import Point, Result
from launch.ladder_text import law_rows, notes, point_rows, predictions, short
from launch.page.chart import BOTTOM, HEIGHT, WIDTH, Axes, curve, value_range
from launch.page.markup import Html, element, fragment, html_page
from launch.page.overlay_page import class_of, table
from launch.page.report_page import GENERATOR, section

CURVE_POINTS = 60


def make_ladder_page(title: str, result: Result) -> str:
    """Returns the whole page."""
    rungs = sorted({point.N for point in result.points})
    names = [element("span", element("i", class_=class_of(i)), f"N = {short(N)}") for i, N in enumerate(rungs)]
    target = element("span", element("i", class_=class_of(len(rungs))), f"target, N = {short(result.N)}")
    charts = element("div", loss_chart(result, rungs), residual_chart(result, rungs), class_="charts")
    parts = [
        element("header", element("h1", title), element("p", *names, target, class_="groups")),
        section("Prediction", *(element("p", line) for line in predictions(result))),
        section("Fit", charts, *(element("p", line, class_="quiet") for line in notes(result))),
        section("Law", element("div", table(law_rows(result)), class_="scrolls")),
        section("Points", element("div", table(point_rows(result)), class_="scrolls")),
    ]
    return html_page(title, GENERATOR, fragment(parts), None, "overlay")


def loss_chart(result: Result, rungs: Sequence[float]) -> Html:
    """Returns the points of each rung over tokens, the law at its N and at the target's, and the target's interval."""
    points, law, prediction = result.points, result.fit.law, result.prediction
    first, last = min(point.D for point in points), max(*(point.D for point in points), result.D)
    values = [*(point.bits for point in points), *prediction]
    axes = Axes(*log_range(first, last), *value_range(np.array(values), from_zero=False))  # type: ignore[arg-type]
    paths = []
    x = np.linspace(axes.first, axes.last, CURVE_POINTS)
    for group, N in enumerate([*rungs, result.N]):
        y = np.array([law.loss(N, 10**place) for place in x])
        paths.append(element("path", class_=f"over thin {class_of(group)}", d=curve(axes, x, y), fill="none"))
        paths.append(dots(axes, group, [(math.log10(p.D), p.bits) for p in points if p.N == N]))
    at = axes.x(math.log10(result.D))
    ends = f"M{at:.1f} {axes.y(prediction.low):.1f}V{axes.y(prediction.high):.1f}"
    paths.append(element("path", class_=f"over {class_of(len(rungs))}", d=ends))
    paths.append(dots(axes, len(rungs), [(math.log10(result.D), prediction.value)]))
    return figure("Held-out loss", "bits a byte, over tokens", axes, paths)


def residual_chart(result: Result, rungs: Sequence[float]) -> Html:
    """Returns by what each point is above the law, over tokens."""
    law = result.fit.law
    above = [(point, point.bits - law.loss(point.N, point.D)) for point in result.points]
    most = max([abs(value) for _, value in above] + [1e-4]) * 1.1
    axes = Axes(*log_range(min(p.D for p in result.points), max(p.D for p in result.points)), -most, most)  # type: ignore[arg-type]
    paths = [dots(axes, group, [place_of(p, value) for p, value in above if p.N == N]) for group, N in enumerate(rungs)]
    return figure("Residuals", "bits a byte above the law", axes, paths)


def place_of(point: Point, value: float) -> tuple[float, float]:
    """Returns a value at the tokens of a point, whose axis is logarithmic."""
    return math.log10(point.D), value


def log_range(first: float, last: float) -> tuple[float, float]:
    """Returns the ends of an axis of logs, with some room."""
    room = 0.05 * math.log10(last / first)
    return math.log10(first) - room, math.log10(last) + room


def dots(axes: Axes, group: int, places: Sequence[tuple[float, float]]) -> Html:
    """Returns dots in the colour of a group."""
    x, y = (np.array([place[i] for place in places]) for i in (0, 1))
    return element("path", class_=f"over {class_of(group)} point", d=curve(axes, x, y, is_line=False))


def figure(title: str, unit: str, axes: Axes, paths: Sequence[Html]) -> Html:
    """Returns a chart whose axis of tokens is logarithmic."""
    values = Axes(0, 1, axes.low, axes.high).drawing()
    grid = [part for part in values if 'class="step"' not in part]
    decades = [10**power * factor for power in range(math.floor(axes.first), math.ceil(axes.last)) for factor in (1, 3)]
    labels = [
        element("text", short(tokens), class_="step", x=f"{axes.x(math.log10(tokens)):.1f}", y=BOTTOM + 17,
                text_anchor="middle")
        for tokens in decades if axes.first <= math.log10(tokens) <= axes.last
    ]  # fmt: skip
    svg = element("svg", *grid, *labels, *paths, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return element("figure", element("figcaption", element("span", title, " ", element("small", unit))), svg)
