"""The history of a run from its audit log: its state, and its starts and faults on one axis of time."""

import datetime
import math
import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

from launch.page.chart import MAX_LONG_MARKS
from launch.page.markup import Html, element, fragment
from train.run.goodput import duration, without_lost_saves

Event = dict[str, Any]
# Class of marks → its meaning. Events that are not a class are faults.
LEGEND = {"start": "start", "stop": "asked to stop", "fault": "crash, fault, rollback", "end": "end", "save": "save"}
# Seconds between two labels of the axis, of which there are at most MAX_LABELS.
INTERVALS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
MAX_LABELS = 5
# Events in the list, and characters of one value.
MAX_ROWS = 100
MAX_CHARACTERS = 300


def seconds_of(event: Event) -> float:
    """Returns the time of an event, in seconds since 1970."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


def class_of(event: Event) -> str:
    """Returns the class of an event's marks."""
    return event["event"] if event["event"] in LEGEND else "fault"


def utc_text(seconds: float, form: str = "%-d %b %Y %H:%M:%S") -> str:
    """Returns a time since 1970 as people read it, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(form)


def run_state(events: Sequence[Event], is_alive: bool, alive_until: float | None) -> tuple[str, str, str]:
    """Returns (class, word, detail) for the state of a run. `alive_until` is its last sign of life since 1970."""
    last = events[-1]["event"] if events else None
    if is_alive:
        ended = last in (None, "stop", "end", "fault", "crash")
        return "end", "starting" if ended else "running", ""
    if last is None:
        return "quiet", "not started", "nothing has happened yet"
    at = f"{utc_text(seconds_of(events[-1]))} UTC"
    if last == "end":
        return "end", "finished", at
    if last == "stop":
        return "stop", "stopped", f"when asked to, {at}; its command resumes it"
    if last == "fault":
        return "fault", "failed", f"{at}: {events[-1].get('error', '')}"
    until = max(alive_until or 0.0, seconds_of(events[-1]))
    return "fault", "crashed", f"no sign of life since {utc_text(until)} UTC; its command resumes it"


def event_steps(events: Sequence[Event]) -> dict[str, list[int]]:
    """Returns the steps of events by the class of their marks. An event without a step has that of the one before."""
    steps: dict[str, list[int]] = {name: [] for name in ("save", "start", "stop", "end", "fault")}
    step = 0
    for event in events:
        step = event.get("step", step)
        steps[class_of(event)].append(step)
    return {name: at for name, at in steps.items() if at}


def legend(names: Container[str], has_lost: bool) -> Html:
    """Returns the meaning of the bars and of the marks of these classes."""
    meanings = {"block running": "running"} | ({"block lost": "steps that were lost"} if has_lost else {})
    meanings |= {name: meaning for name, meaning in LEGEND.items() if name in names}
    entries = (element("span", element("i", class_=name), meaning) for name, meaning in meanings.items())
    return element("p", *entries, class_="legend")


def running_spans(events: Sequence[Event], now: float) -> list[tuple[float, float, str]]:
    """Returns (begin, end, "up" or "lost") of each time in which the run ran; "lost" was undone by a crash or fault.

    `now` ends the last one where no event does (seconds since 1970).
    """
    spans: list[tuple[float, float, str]] = []
    begin = kept = None
    for event in without_lost_saves(events):
        name, at = event["event"], seconds_of(event)
        if name == "start":
            if begin is not None:
                spans.append((begin, kept or begin, "up"))
            begin, kept = at - sum(event.get("seconds", {}).values()), at
        elif name in ("crash", "fault") and begin is not None and kept is not None:
            spans += [(begin, kept, "up"), (kept, max(event.get("alive_until", at), kept), "lost")]
            begin = None
        elif name in ("stop", "end") and begin is not None:
            spans.append((begin, at, "up"))
            begin = None
        elif name == "save":
            kept = at
    if begin is not None:
        spans.append((begin, max(now, kept or begin), "up"))
    return [span for span in spans if span[0] < span[1]]


def time_axis(events: Sequence[Event], spans: Sequence[tuple[float, float, str]]) -> Html:
    """Returns all starts on one axis of time, as bars (see `running_spans`) with marks of the other events."""
    first = min([seconds_of(events[0]), *(begin for begin, _, _ in spans)])
    last = max([seconds_of(events[-1]), *(end for _, end, _ in spans)])
    length = max(last - first, 1e-3)

    def place(seconds: float) -> str:
        return f"{100 * (seconds - first) / length:.1f}%"

    parts = [
        element("div", class_=name, style=f"left:{place(begin)};width:{100 * (end - begin) / length:.2f}%")
        for begin, end, name in spans
    ]
    places: dict[str, set[str]] = {}
    for event in events:
        places.setdefault(class_of(event), set()).add(place(event.get("alive_until", seconds_of(event))))
    places.pop("save", None)
    for name, lefts in places.items():
        size = " many" * (len(lefts) > MAX_LONG_MARKS)
        parts += [element("div", class_=f"at {name}{size}", style=f"left:{left}") for left in sorted(lefts)]
    parts.append(element("div", class_="rule"))
    days = math.ceil(length / MAX_LABELS / 86400)
    interval = next((seconds for seconds in INTERVALS if length / seconds <= MAX_LABELS), days * 86400)
    for k in range(math.ceil(first / interval), math.floor(last / interval) + 1):
        at = interval * k
        if (at - first) / length < 0.88:
            hour_or_day = "%H:%M" if at % 86400 else "%-d %b"
            text = utc_text(at, "%H:%M:%S" if interval < 60 else hour_or_day)
            parts.append(element("div", text, class_="tick", style=f"left:{place(at)}"))
    starts = sum(event["event"] == "start" for event in events)
    label = f"from {utc_text(first)} to {utc_text(last)} UTC: {starts} starts"
    return element("div", *parts, class_="time", role="img", aria_label=label)


def event_list(events: Sequence[Event]) -> Html:
    """Returns a list of all events but saves, which are summed up. A start shows what differs from the one before."""
    rows = []
    previous_start: dict[str, Any] = {}
    for event in events:
        if event["event"] == "save":
            continue
        fields = {name: value for name, value in event.items() if name not in ("time", "event", "step", "seconds")}
        shown = fields
        if event["event"] == "start":
            shown = {name: value for name, value in fields.items() if previous_start.get(name) != value}
            previous_start = fields
        values = {name: field_text(name, value) for name, value in shown.items() if value}
        texts = [f"{name} {text[:MAX_CHARACTERS]}{'…' * (len(text) > MAX_CHARACTERS)}" for name, text in values.items()]
        kind = element("span", event["event"], class_=class_of(event))
        step = f"step {event['step']:,}" if "step" in event else ""
        time = element("span", utc_text(seconds_of(event)))
        rows.append(element("li", time, kind, element("span", step), element("span", "; ".join(texts))))
    if (left_out := len(rows) - MAX_ROWS) > 0:
        gap = element("span", f"{left_out:,} events are left out here", class_="quiet")
        rows[1 : 1 + left_out] = [element("li", gap)]
    note = "Times are UTC."
    if stalls := [event["stall_seconds"] for event in events if "stall_seconds" in event]:
        median, most = short_duration(statistics.median_high(stalls)), short_duration(max(stalls))
        note += f" {len(stalls):,} saves kept the steps waiting for {median} (median), {most} at most."
    return fragment([element("ol", *rows, class_="events"), element("p", note, class_="quiet")])


def short_duration(seconds: float) -> str:
    """Returns a duration, with fractions of seconds below 10 s."""
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)


def field_text(name: str, value: Any) -> str:
    """Returns the value of an event's field; a fingerprint or commit is shortened, a time is made readable."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {field_text('', inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(field_text("", inner) for inner in value)
    if name == "alive_until":
        return f"{utc_text(value)} UTC"
    text = str(value)
    if name in ("commit", "config", "data") and len(text) >= 40:
        # The + after a commit marks uncommitted changes.
        return text[:12] + text[40:41] * (name == "commit")
    return text
