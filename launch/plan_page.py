"""The page of a plan: its memory, the time of a step, the compiled schedule as a timeline, and a roofline."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from launch.page.lanes import Block, lanes_chart
from launch.page.markup import Html, element, fragment, html_page
from launch.page.report_page import changed_settings, section
from launch.page.roofline import Point, roofline_chart
from launch.plan_text import MEMORY, days_text, mesh_text, seconds_text, size_text
from train.config.config import public
from train.planning.roofline import Work, largest_operations

if TYPE_CHECKING:
    from train.config.config import ResolvedConfig
    from train.devices.hardware import Chip
    from train.planning.plan import Plan, Simulation
    from train.planning.timeline import Interval, Timeline

# By this comment a later plan recognizes a page that it may replace.
GENERATOR = "<!-- ziggurat plan -->"
# Parts of the peak of a device's memory, in the order of the bar; `other` is what the compiler adds to the arguments.
PARTS_OF_PEAK = ("weights", "optimizer", "average", "reference", "batch", "other", "temporaries")
# Class of the timeline's blocks → its meaning.
LEGEND = {
    "compute": "computing", "waiting": "waiting", "link": "communication", "host": "copies to the host's memory",
    "memory": "copies within the device's memory",
}  # fmt: skip
# Class of blocks → the name of their lane; communication has a lane for the mesh axes that it goes over.
LANES = {"compute": "compute", "waiting": "compute", "host": "host copies", "memory": "memory copies"}
MAX_POINTS, MAX_ROWS = 60, 20
TICKS = 4


def make_plan_page(
    name: str, plan: "Plan", config: "ResolvedConfig", chip: "Chip", simulation: "Simulation | None", comparison: str
) -> str:
    """Returns the whole page of a plan, whose config is called `name`; there is no simulation of what is refused.

    `comparison` is the text of a run's own figures, or empty.
    """
    devices = f"{plan.devices} × {plan.device_kind} as {mesh_text(plan.mesh)}"
    state = element("span", "fits" if plan.fits else "does not fit", class_=f"state {'end' if plan.fits else 'fault'}")
    line = element("p", state, " ", element("span", f"{plan.topology}: {devices}", class_="quiet"))
    parts = [element("header", element("h1", name), line, key_figures(plan))]
    parts.append(section("Memory of a device", *memory_bar(plan)))
    if plan.refused:
        parts.append(element("p", f"The compiler says: {plan.refused}"))
    if simulation:
        parts.append(section("Time of a step", breakdown_table(plan), *notes(plan)))
        parts.append(section("Timeline of a step", *timeline_chart(simulation.timeline)))
        works = largest_operations(simulation.program, chip, MAX_POINTS)
        parts.append(section("Largest operations", *operations(works, chip, simulation.timeline.total)))
        if plan.collectives:
            parts.append(section("Communication of a device", collectives_table(plan)))
    if comparison:
        parts.append(section("Next to the run", element("pre", comparison)))
    parts.append(section("Settings", changed_settings(public(config))))
    parts.append(element("p", "Made by ziggurat plan.", class_="quiet"))
    return html_page(f"{name} on {plan.topology}", GENERATOR, fragment(parts), None, "plan")


def key_figures(plan: "Plan") -> Html:
    """Returns the most important numbers as a list of (name, value, detail)."""
    share = plan.peak_bytes_per_device / plan.memory_bytes_per_device
    figures = [("memory", size_text(plan.peak_bytes_per_device), f"{share:.0%} of a device's")]
    if plan.estimated_step_seconds and plan.estimated_mfu and plan.tokens_per_second:
        figures.append(("a step", seconds_text(plan.estimated_step_seconds), f"bottleneck: {plan.bottleneck}"))
        figures.append(("speed", f"{plan.tokens_per_second:,.0f}", "tokens a second"))
        figures.append(("MFU", f"{plan.estimated_mfu:.1%}", "of the chips' peak"))
    figures.append(("batch", f"{plan.rows_per_step:,}", f"rows, {plan.tokens_per_step:,} tokens"))
    if plan.days and plan.device_hours:
        figures.append((f"{plan.tokens:.3g} tokens", days_text(plan.days), f"{plan.device_hours:,.1f} device-hours"))
    if plan.cost is not None:
        figures.append(("cost", f"${plan.cost:,.0f}", f"at ${plan.price:g} a device-hour"))
    entries = (
        element("div", element("dt", title), element("dd", value, element("small", detail)))
        for title, value, detail in figures
    )
    return element("dl", *entries, class_="figures")


def peak_parts(plan: "Plan") -> dict[str, int]:
    """Returns the bytes of PARTS_OF_PEAK, which add up to the peak; of a refused program most of them are `other`."""
    sizes = {name: plan.memory.get(name, 0) for name in PARTS_OF_PEAK}
    sizes["other"] = plan.peak_bytes_per_device - sum(sizes.values())
    return {name: size for name, size in sizes.items() if size > 0}


def memory_bar(plan: "Plan") -> tuple[Html, Html]:
    """Returns the peak as a bar as wide as the device's memory, or as the peak if that is larger, and a table."""
    width = max(plan.memory_bytes_per_device, plan.peak_bytes_per_device)
    sizes = peak_parts(plan)
    blocks = [element("i", class_=name, style=f"width:{100 * size / width:.2f}%") for name, size in sizes.items()]
    if not plan.fits:
        at = 100 * plan.memory_bytes_per_device / width
        blocks.append(element("i", class_="limit", style=f"left:{at:.2f}%", title="the device's memory"))
    bar = element("div", *blocks, class_="stack", role="img", aria_label="parts of the peak of memory")
    words = MEMORY | {"other": "what the compiler adds"}
    rows = [
        row((element("i", class_=f"key {name}"), words[name]), (size_text(size), f"{size / width:.1%}"))
        for name, size in sizes.items()
    ]
    free = plan.memory_bytes_per_device - plan.peak_bytes_per_device
    rows.append(row(("free" if free >= 0 else "too much",), (size_text(abs(free)), f"{abs(free) / width:.1%}")))
    apart = {name: size for name, size in plan.memory.items() if name not in PARTS_OF_PEAK and size}
    rows += [row((words[name],), (size_text(size), "")) for name, size in apart.items()]
    return bar, element("table", *rows)


def row(words: Iterable[object], numbers: Iterable[object]) -> Html:
    """Returns a row of a table: one cell for the words, and one for each number."""
    return element("tr", element("td", *words), *(element("td", number, class_="number") for number in numbers))


def head(words: str, *numbers: str) -> Html:
    """Returns the first row of such a table."""
    return element("tr", element("th", words), *(element("th", text, class_="number") for text in numbers))


def breakdown_table(plan: "Plan") -> Html:
    """Returns the terms that add up to the estimated time, with bars."""
    step = plan.estimated_step_seconds or 1.0
    rows = []
    for words, seconds in plan.breakdown:
        bar = element("td", element("i", style=f"width:{max(100 * seconds / step, 0):.1f}%"), class_="bar")
        numbers = (element("td", text, class_="number") for text in (seconds_text(seconds), f"{seconds / step:.1%}"))
        rows.append(element("tr", element("td", words), *numbers, bar))
    return element("table", *rows)


def notes(plan: "Plan") -> list[Html]:
    """Returns paragraphs about where the estimate is from."""
    return [element("p", text, class_="quiet") for text in (f"Estimated by {plan.estimated_by}.", *plan.notes)]


def timeline_chart(line: "Timeline") -> list[Html]:
    """Returns the schedule of one step in lanes, their legend, and a note on how it is to be read."""
    loops = [at for at in line.intervals if at.lane == "loop"]
    blocks = []
    for at, depth in with_depth(loops):
        title = f"{at.name}: {at.passes} passes, {seconds_text((at.end - at.start) / at.passes)} each"
        blocks.append(Block(f"loops{' within' * depth}", "loop", title, at.start, at.end, f"× {at.passes}"))
    others = [at for at in line.intervals if at.lane != "loop"]
    for at in sorted(others, key=lambda at: list(LEGEND).index(kind_of(at))):
        kind = kind_of(at)
        title = f"{'waiting: ' * (kind == 'waiting')}{at.name}, {(at.end - at.start) / line.total:.2%} of the step"
        lane = f"links {at.lane}" if kind == "link" else LANES[kind]
        blocks.append(Block(lane, kind, title, at.start, min(at.end, line.total)))
    ticks = [(line.total * k / TICKS, seconds_text(line.total * k / TICKS) if k else "0") for k in range(TICKS)]
    chart = lanes_chart(blocks, line.total, ticks, f"timeline of one step of {seconds_text(line.total)}")
    used = {block.kind for block in blocks}
    legend = (element("span", element("i", class_=kind), text) for kind, text in LEGEND.items() if kind in used)
    note = "A loop is drawn as one pass, as wide as all of its passes together, so every width is a share of the step."
    return [chart, element("p", *legend, class_="legend"), element("p", note, class_="quiet")]


def kind_of(at: "Interval") -> str:
    """Returns the class of an interval's block."""
    return at.lane if at.lane in LANES else "link"


def with_depth(loops: Sequence["Interval"]) -> list[tuple["Interval", int]]:
    """Returns loops, the outer ones first, and the number of loops around each."""
    around: list[Interval] = []
    nested = []
    for at in sorted(loops, key=lambda at: (at.start, -at.end)):
        middle = (at.start + at.end) / 2
        around = [outer for outer in around if outer.end > middle]
        nested.append((at, len(around)))
        around.append(at)
    return sorted(nested, key=lambda pair: pair[1])


def operations(works: Sequence[Work], chip: "Chip", step: float) -> tuple[Html, Html, Html]:
    """Returns the roofline of operations with matrix products or kernels, a note, and a table of the largest ones."""
    points = [
        Point(f"{label(work)} ({work.name}): {work.seconds / step:.1%} of the step", work.intensity,
              work.flops / work.seconds, work.seconds / step)
        for work in works
        if work.flops and work.bytes
    ]  # fmt: skip
    chart = roofline_chart(points, chip.peak_flops, chip.memory_bandwidth, f"roofline of {len(points)} operations")
    title = element("span", "Roofline ", element("small", "TFLOP/s by FLOPs for each byte of memory traffic"))
    corner = chip.peak_flops / chip.memory_bandwidth
    note = (
        f"{chip.name}: {chip.peak_flops / 1e12:,.4g} TFLOP/s and {chip.memory_bandwidth / 1e9:,.4g} GB/s, which meet "
        f"at {corner:,.0f} FLOPs a byte. A point's area is its share of the step; those without traffic are not drawn."
    )
    rows = [head("operation", "runs", "time", "step", "FLOPs/byte", "peak")]
    for work in works[:MAX_ROWS]:
        intensity = f"{work.intensity:,.0f}" if work.flops and work.bytes else ""
        peak = f"{work.flops / work.seconds / chip.peak_flops:.0%}" if work.flops else ""
        numbers = (f"{work.times:,}", seconds_text(work.seconds), f"{work.seconds / step:.1%}", intensity, peak)
        rows.append(row((label(work), " ", element("small", work.name, class_="quiet")), numbers))
    table = element("div", element("table", *rows), class_="wide")
    return (
        element("figure", element("figcaption", title), chart, class_="roofline"),
        element("p", note, class_="quiet"),
        table,
    )


def label(work: Work) -> str:
    """Returns an operation as in "btd,df->btf, backward": the last names of the traced one, and its pass."""
    names = [name for name in work.source.split("/") if name not in ("dot_general", "pallas_call")]
    if len(names) < 2:
        return work.name
    passes = {"rematted_computation": "recomputed", "transpose(": "backward", "jvp(": "forward"}
    found = next((text for words, text in passes.items() if words in work.source), None)
    return names[-1] + (f", {found}" if found else "")


def collectives_table(plan: "Plan") -> Html:
    """Returns a row for each kind of communication."""
    step = plan.estimated_step_seconds or 1.0
    rows = [
        row(
            (f"{c['kind']} over {' × '.join(c['axes'])}, {c['dtype']}",),
            (f"{c['count']:,}", size_text(c["bytes"]), seconds_text(c["seconds"]), f"{c['seconds'] / step:.1%}"),
        )
        for c in plan.collectives
    ]
    return element(
        "div", element("table", head("communication", "runs", "bytes", "links busy", "step"), *rows), class_="wide"
    )
