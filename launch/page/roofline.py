"""The roofline of a chip, and operations below it (Williams et al. 2009), as SVG with logarithmic axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from launch.page.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, axis_labels
from launch.page.markup import Html, element

# Radius of the point of an operation that takes all of the time.
MAX_RADIUS = 16.0
# Orders of magnitude below the roof's corner that are always drawn, and the most in all.
MARGIN, MAX_DECADES = 1, 6


class Point(NamedTuple):
    """One operation."""

    title: str  # text under the pointer
    intensity: float  # FLOPs for each byte of memory traffic
    speed: float  # FLOP/s
    share: float  # part of the whole time


def roofline_chart(points: Sequence[Point], peak: float, bandwidth: float, description: str) -> Html:
    """Returns the chart of points with positive numbers; `peak` is in FLOP/s, `bandwidth` in bytes/s."""
    corner = peak / bandwidth
    left, right = decades([*(point.intensity for point in points), corner / 10**MARGIN, corner * 10**MARGIN])
    low, high = decades([*(point.speed for point in points), peak / 10**MARGIN, peak])
    axes = Axes(left, right, low, high)

    def x(intensity: float) -> float:
        return axes.x(min(max(math.log10(intensity), left), right))

    def y(speed: float) -> float:
        return axes.y(max(math.log10(speed), low))

    # The roof begins where the bandwidth meets the chart's left edge or its floor.
    begin = max(10.0**left, 10.0**low / bandwidth)
    roof = f"M{x(begin):.1f} {y(begin * bandwidth):.1f}L{x(corner):.1f} {y(peak):.1f}H{RIGHT}"
    grid = "".join(f"M{LEFT} {axes.y(power):.1f}H{RIGHT}" for power in range(low, high + 1))
    grid += "".join(f"M{axes.x(power):.1f} {TOP}V{BOTTOM}" for power in range(left, right + 1))
    circles = (
        element("circle", element("title", point.title), class_="point", cx=f"{x(point.intensity):.1f}",
                cy=f"{y(point.speed):.1f}", r=f"{max(MAX_RADIUS * math.sqrt(point.share), 1.5):.1f}")
        for point in points
    )  # fmt: skip
    speeds = (
        element("text", f"{10.0 ** (power - 12):g}", x=LEFT - 6, y=f"{axes.y(power) + 4:.1f}", text_anchor="end")
        for power in range(low, high + 1)
    )
    intensities = (
        element("text", *axis_labels([10.0**power]), x=f"{axes.x(power):.1f}", y=BOTTOM + 17, text_anchor="middle")
        for power in range(left, right + 1)
    )
    return element(
        "svg",
        element("path", class_="grid", d=grid),
        *speeds,
        *intensities,
        element("path", class_="line", d=roof),
        *circles,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=description,
    )


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Returns the powers of ten around positive values, at most MAX_DECADES apart: the lowest values are left out."""
    high = math.ceil(math.log10(max(values)))
    return max(math.floor(math.log10(min(values))), high - MAX_DECADES), high
