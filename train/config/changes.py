"""What a run would do otherwise than before: field by field, by what each may do on resume, as a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from train.config.config import Config, config_fields

TITLES = ("field", "before", "now")


class Change(NamedTuple):
    """A field's name ("group.field"), its value before and its value now."""

    field: str
    before: Any
    now: Any


def changes_of(saved: Config, asked: Config) -> dict[str, list[Change]]:
    """The fields that differ, by the rule of their metadata: {"frozen": [...], "warn": [...], "free": [...]}."""
    found: dict[str, list[Change]] = {"frozen": [], "warn": [], "free": []}
    for group, name, setting in config_fields():
        before, now = getattr(getattr(saved, group), name), getattr(getattr(asked, group), name)
        if before != now:
            found[setting.metadata.get("resume", "frozen")].append(Change(f"{group}.{name}", before, now))
    return found


def table(changes: Sequence[Change]) -> str:
    """Changes for a person: aligned columns under their titles, two spaces from the margin."""
    rows = [TITLES, *((change.field, _shown(change.before), _shown(change.now)) for change in changes)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {field:{widths[0]}}  {before:{widths[1]}}  {now}" for field, before, now in rows)


def _shown(value: Any) -> str:
    """A value as a flag gives it; of a fingerprint the beginning."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
