"""Goodput: the share of a run's time that went into steps that count, and how the other time was spent.

Each start keeps a time account; saves write it to the audit log, so that the time lost to a fault is known, too. (The
measure is that of Google Cloud's ML Goodput, 2024.)
"""

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What a start can be doing, in the order in which it is shown.
ACTIVITIES = ("steps", "data", "evaluation", "checkpoint", "compile", "init")
# Not activities: steps lost to faults and rollbacks, and downtime between starts.
LOST, DOWN = "lost", "down"


class TimeAccount:
    """The seconds of this start by ACTIVITIES; `activity` is the present one, at first `init`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.activity = "init"
        self._since = clock()
        self._seconds = dict.fromkeys((*ACTIVITIES, LOST), 0.0)
        self._saved = 0.0

    def switch_to(self, activity: str) -> None:
        """Counts the time from now on as this activity."""
        now = self._clock()
        self._seconds[self.activity] += now - self._since
        self.activity = activity
        self._since = now

    def mark_saved(self) -> None:
        """Notes that the steps so far are saved."""
        self.switch_to(self.activity)
        self._saved = self._seconds["steps"]

    def discard_unsaved(self) -> None:
        """Counts the steps since the last save as lost."""
        self.switch_to(self.activity)
        self._seconds[LOST] += self._seconds["steps"] - self._saved
        self._seconds["steps"] = self._saved

    def seconds(self) -> dict[str, float]:
        """Returns the seconds so far by activity, and those `lost`."""
        self.switch_to(self.activity)
        return {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}


def goodput(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the seconds of a whole run by ACTIVITIES, `lost` (from a save to a fault or crash) and `down`."""
    if not events:
        return {}
    totals = dict.fromkeys((*ACTIVITIES, LOST, DOWN), 0.0)
    account: dict[str, float] = {}
    ended = saved = None

    def add(seconds: dict[str, float]) -> None:
        for kind in totals.keys() & seconds.keys():
            totals[kind] += seconds[kind]

    for event in without_lost_saves(events):
        at = datetime.datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] in ("crash", "fault") and saved is not None:
            ended = max(event.get("alive_until", at), saved)
            totals[LOST] += ended - saved
        if event["event"] == "start":
            add(account)
            if ended is not None:
                totals[DOWN] += max(at - sum(event["seconds"].values()) - ended, 0.0)
        if event["event"] in ("start", "save", "stop", "end"):
            account = event["seconds"]
            saved = ended = at
    add(account)
    return totals


def without_lost_saves(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the events without each `save` that the next start did not find: its checkpoint was never complete."""
    kept: list[dict[str, Any]] = []
    found = math.inf  # the step of the next start
    for event in reversed(events):
        if event["event"] == "start":
            found = event.get("step", math.inf)
        if event["event"] != "save" or event.get("step", 0) <= found:
            kept.append(event)
    return kept[::-1]


def duration(seconds: float) -> str:
    """Formats seconds for people: 45 s, 3 min 20 s, 5 h 12 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shares(seconds: Mapping[str, float]) -> str:
    """Formats a run's total time with the shares of steps and of each activity above 0.5%."""
    total = sum(seconds.values())
    fractions = {kind: value / max(total, 1e-9) for kind, value in seconds.items()}
    shown = [f"{fraction:.0%} {kind}" for kind, fraction in fractions.items() if kind == "steps" or fraction > 0.005]
    return f"{duration(total)}: {', '.join(shown)}"
