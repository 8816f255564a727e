"""Differences between the saved and the requested config of a run, by what may change on resume."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from train.config.config import Config, config_fields


class Change(NamedTuple):
    """A changed field ("group.field"), with its value before and its value now."""

    field: str
    before: Any
    now: Any


def changes_of(saved: Config, requested: Config) -> dict[str, list[Change]]:
    """Returns the fields that differ, by their rule on resume: {"frozen": [...], "warn": [...], "free": [...]}."""
    changes: dict[str, list[Change]] = {"frozen": [], "warn": [], "free": []}
    for group, name, field in config_fields():
        before = getattr(getattr(saved, group), name)
        now = getattr(getattr(requested, group), name)
        # Of groups of parameters, the later wins.
        if before != now or (isinstance(now, dict) and list(before) != list(now)):
            changes[field.metadata["resume"]].append(Change(f"{group}.{name}", before, now))
    return changes


def table(changes: Sequence[Change]) -> str:
    """Formats changes as aligned columns under their titles, with a margin of two spaces."""
    rows = [
        ("field", "before", "now"),
        *((change.field, text_of_value(change.before), text_of_value(change.now)) for change in changes),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {field:{widths[0]}}  {before:{widths[1]}}  {now}" for field, before, now in rows)


def text_of_value(value: Any) -> str:
    """Formats a value as a flag takes it, and shortens a fingerprint."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
