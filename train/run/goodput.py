"""Goodput: the share of a run's time that went into steps that count, and where the rest went.

Each start keeps an account of its own; saves put it into the audit log, so that what a fault takes away is known, too.
(The measure is that of Google Cloud's ML Goodput, 2024.)
"""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# What a start does, in the order in which it is shown.
KINDS = ("steps", "data", "evaluation", "checkpoint", "compile", "init")
# What nobody does: steps that a fault or a rollback has taken away, and the time when nothing ran.
LOST, DOWN = "lost", "down"


class TimeAccount:
    """Seconds of this start by KINDS. It begins with `init`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._kind, self._since = clock, "init", clock()
        self._seconds = dict.fromkeys((*KINDS, LOST), 0.0)
        self._kept = 0.0

    def switch_to(self, kind: str) -> None:
        """From now on it does this."""
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def mark_saved(self) -> None:
        """The steps so far are saved."""
        self.switch_to(self._kind)
        self._kept = self._seconds["steps"]

    def discard_unsaved(self) -> None:
        """The steps since the last save are undone."""
        self.switch_to(self._kind)
        self._seconds[LOST] += self._seconds["steps"] - self._kept
        self._seconds["steps"] = self._kept

    def seconds(self) -> dict[str, float]:
        """So far, `lost` among them."""
        self.switch_to(self._kind)
        return {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}


def goodput(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a whole run, from its first start to its last word, by KINDS, `lost` and `down`.

    Args:
        events: of its audit log; none: there is nothing to account for. What came after the last save before a fault
            or a crash is lost.
    """
    if not events:
        return {}
    found = dict.fromkeys((*KINDS, LOST, DOWN), 0.0)
    account: dict[str, float] = {}
    ended = kept = None

    def add(seconds: dict[str, float]) -> None:
        for kind, value in seconds.items():
            found[kind] += value

    for event in events:
        at = datetime.datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] in ("crash", "fault") and kept is not None:
            ended = max(event.get("alive_until", at), kept)
            found[LOST] += ended - kept
        if event["event"] == "start":
            add(account)
            if ended is not None:
                found[DOWN] += max(at - sum(event["seconds"].values()) - ended, 0.0)
        if event["event"] in ("start", "save", "stop", "end"):
            account, kept, ended = event["seconds"], at, at
    add(account)
    return found


def duration(seconds: float) -> str:
    """Seconds as people write them: 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shares(seconds: Mapping[str, float]) -> str:
    """All the time of a run, and what it went into: steps, and whatever took more than 0.5% of it."""
    whole = sum(seconds.values())
    parts = {kind: value / max(whole, 1e-9) for kind, value in seconds.items()}
    told = [f"{part:.0%} {kind}" for kind, part in parts.items() if kind == "steps" or part > 0.005]
    return f"{duration(whole)}: {', '.join(told)}"
