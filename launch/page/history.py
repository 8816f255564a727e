"""What happened to a run, from its audit log: whether it lives, and its starts and faults as a line of time."""

import datetime
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from launch.page.chart import MANY
from launch.page.markup import Html, join, tag
from train.run.goodput import duration

Event = Mapping[str, Any]
# Events → the class of their marks; others are faults.
CLASSES = {"start": "start", "save": "save", "stop": "stop", "end": "end"}
LEGEND = {"start": "start", "stop": "asked to stop", "fault": "crash, fault, rollback", "end": "end", "save": "save"}
# Seconds between two labels of a line of time.
INTERVALS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
LABELS = 5
# Events in the list, at most.
ROWS = 100
# Of one value in it, at most.
CHARACTERS = 300


def seconds_of(event: Event) -> float:
    """When it was, in seconds since 1970."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def class_of(event: Event) -> str:
    """Of its marks."""
    return CLASSES.get(event["event"], "fault")


def moment(seconds: float) -> str:
    """A time as people read it, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%-d %b %Y %H:%M:%S")


def state(events: Sequence[dict[str, Any]], is_alive: bool, alive_until: float | None) -> tuple[str, str, str]:
    """(class, word, more) for whether the run lives and how it ended.

    Args:
        events: of its audit log.
        is_alive: a process holds the run, and shows it.
        alive_until: when one did last (seconds since 1970), if that is known.
    """
    last = events[-1]["event"] if events else None
    if is_alive:
        ended = last in (None, "stop", "end", "fault", "crash")
        return "end", "starting" if ended else "running", ""
    if last is None:
        return "quiet", "not started", "nothing has happened yet"
    at = f"{moment(seconds_of(events[-1]))} UTC"
    if last == "end":
        return "end", "finished", at
    if last == "stop":
        return "stop", "stopped", f"when asked to, {at}; its command goes on"
    if last == "fault":
        return "fault", "failed", f"{at}: {events[-1].get('error', '')}"
    until = max(alive_until or 0.0, seconds_of(events[-1]))
    return "fault", "crashed", f"no sign of life since {moment(until)} UTC; its command goes on"


def marks(events: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The steps of events by the class of their marks; one without a step of its own stands at that before it."""
    found: dict[str, list[int]] = {name: [] for name in ("save", "start", "stop", "end", "fault")}
    step = 0
    for event in events:
        step = event.get("step", step)
        found[class_of(event)].append(step)
    return {name: steps for name, steps in found.items() if steps}


def legend(names: Container[str], has_lost: bool) -> Html:
    """What the bars and the marks mean, of those that there are."""
    blocks = {"running": "running"} | ({"lost": "steps that were lost"} if has_lost else {})
    return tag(
        "p",
        *(tag("span", tag("i", class_=f"block {name}"), meaning) for name, meaning in blocks.items()),
        *(tag("span", tag("i", class_=name), meaning) for name, meaning in LEGEND.items() if name in names),
        class_="legend",
    )


def stretches(events: Sequence[dict[str, Any]], now: float) -> list[tuple[float, float, str]]:
    """(begin, end, "up" or "lost") of the times in which something ran; what a crash or fault has taken is lost.

    Args:
        events: of the audit log.
        now: when the last start has last been seen, if it has not ended (seconds since 1970).
    """
    found: list[tuple[float, float, str]] = []
    begin = kept = None
    for event in events:
        name, at = event["event"], seconds_of(event)
        if name == "start":
            if begin is not None:
                found.append((begin, kept or begin, "up"))
            begin, kept = at - sum(event.get("seconds", {}).values()), at
        elif name in ("crash", "fault") and begin is not None and kept is not None:
            found += [(begin, kept, "up"), (kept, max(event.get("alive_until", at), kept), "lost")]
            begin = None
        elif name in ("stop", "end") and begin is not None:
            found.append((begin, at, "up"))
            begin = None
        elif name == "save":
            kept = at
    if begin is not None:
        found.append((begin, max(now, kept or begin), "up"))
    return [stretch for stretch in found if stretch[0] < stretch[1]]


def line_of_time(events: Sequence[dict[str, Any]], ran: Sequence[tuple[float, float, str]]) -> Html:
    """All starts on one line of time (see `stretches`), with what began and ended them."""
    first = min([seconds_of(events[0]), *(begin for begin, _, _ in ran)])
    last = max([seconds_of(events[-1]), *(end for _, end, _ in ran)])
    span = max(last - first, 1e-3)

    def place(seconds: float) -> str:
        return f"{100 * (seconds - first) / span:.1f}%"

    def bar(begin: float, end: float, name: str) -> Html:
        style = f"left:{place(begin)};width:{100 * (end - begin) / span:.2f}%"
        return tag("div", class_=name, style=style)

    at: dict[str, set[str]] = {}
    for event in events:
        at.setdefault(class_of(event), set()).add(place(event.get("alive_until", seconds_of(event))))
    at.pop("save", None)
    every = next((s for s in INTERVALS if span / s <= LABELS), math.ceil(span / LABELS / 86400) * 86400)
    labels = [every * k for k in range(math.ceil(first / every), math.floor(last / every) + 1)]
    return tag(
        "div",
        *(bar(*stretch) for stretch in ran),
        *(
            tag("div", class_=f"at {name}" + " many" * (len(places) > MANY), style=f"left:{left}")
            for name, places in at.items()
            for left in sorted(places)
        ),
        tag("div", class_="rule"),
        *(
            tag("div", tick(label, every), class_="tick", style=f"left:{place(label)}")
            for label in labels
            if (label - first) / span < 0.88
        ),
        class_="time",
        role="img",
        aria_label=f"from {moment(first)} to {moment(last)} UTC: {sum(e['event'] == 'start' for e in events)} starts",
    )  # fmt: skip


def tick(seconds: float, every: float) -> str:
    """The label of a moment, where there is one each so many seconds: its time, at midnight its day."""
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.strftime("%H:%M:%S" if every < 60 else "%H:%M" if seconds % 86400 else "%-d %b")


def listing(events: Sequence[dict[str, Any]]) -> Html:
    """All events but saves, which are summed up; of a start, what is other than at the start before."""
    rows, before = [], dict[str, Any]()
    for event in events:
        if event["event"] == "save":
            continue
        told = {name: value for name, value in event.items() if name not in ("time", "event", "step", "seconds")}
        if event["event"] == "start":
            told, before = {name: value for name, value in told.items() if before.get(name) != value}, told
        rows.append(
            tag(
                "li",
                tag("span", moment(seconds_of(event))),
                tag("span", event["event"], class_=class_of(event)),
                tag("span", f"step {event['step']:,}" if "step" in event else ""),
                tag("span", "; ".join(f"{name} {cut(short(name, value))}" for name, value in told.items() if value)),
            )
        )
    if (left_out := len(rows) - ROWS) > 0:
        rows[1 : 1 + left_out] = [tag("li", tag("span", f"{left_out:,} events are left out here", class_="quiet"))]
    stalls = sorted(event["stall_seconds"] for event in events if "stall_seconds" in event)
    told_of_saves = stalls and (
        f" {len(stalls):,} saves kept the steps waiting for {short_duration(stalls[len(stalls) // 2])} (median), "
        f"{short_duration(stalls[-1])} at most."
    )
    return join([tag("ol", *rows, class_="events"), tag("p", "Times are UTC.", told_of_saves or "", class_="quiet")])


def short_duration(seconds: float) -> str:
    """A short time with its fractions, a long one without."""
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)


def short(name: str, value: Any) -> str:
    """The value of an event's field; of a fingerprint or commit its beginning, of a time a readable one."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {short('', inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(short("", inner) for inner in value)
    if name == "alive_until":
        return f"{moment(value)} UTC"
    text = str(value)
    if name in ("commit", "config", "data") and len(text) >= 40:
        return text[:12] + text[40:41] * (name == "commit")
    return text


def cut(text: str) -> str:
    """What is too long for the list ends early."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + "…"
