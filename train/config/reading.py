"""Makes a config from a preset, a file and flags."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from data.errors import InputError
from train.config.checks import config_problems
from train.config.config import Config, config_fields


def make_config(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Settings from a preset's values and the command line's.

    Args:
        values: {group: {field: value}}, whatever is left out keeps its default.
        overrides: {"group.field": text}, read by the field's type; they win.

    Raises:
        InputError: every unknown name, wrong type and impossible combination, one a line.
    """
    problems: list[str] = []
    known = {f"{group}.{name}": setting for group, name, setting in config_fields()}
    chosen: dict[str, Any] = {}

    given: dict[str, Any] = {}
    for group, fields in values.items():
        if group not in {f.name for f in dataclasses.fields(Config)}:
            problems.append(f"{group}: there is no such group{nearest(group, [n.split('.')[0] for n in known])}")
        elif not isinstance(fields, Mapping):
            problems.append(f"{group} is {fields!r}; it must hold fields, as in {group}.{_first_field(known, group)}")
        else:
            given |= {f"{group}.{name}": value for name, value in fields.items()}
    for source, read in ((given, from_value), (overrides or {}, from_text)):
        for name, value in source.items():
            if name not in known:
                problems.append(f"{name}: there is no such field{nearest(name, list(known))}")
                continue
            try:
                chosen[name] = read(value, kinds_of(known[name]))
            except ValueError as error:
                problems.append(f"{name} is {value!r}; it must be {error}")

    config = _build(chosen)
    problems += config_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    return config


def nearest(name: str, names: list[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    found = difflib.get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    if not found and "." in name:
        found = [known for known in sorted(set(names)) if known.endswith("." + name.rsplit(".", 1)[1])][:1]
    return f"; did you mean {found[0]}?" if found else ""


def _first_field(known: Mapping[str, Any], group: str) -> str:
    return next(name.split(".")[1] for name in known if name.startswith(group + "."))


def _build(chosen: Mapping[str, Any]) -> Config:
    """The dataclasses with the chosen fields."""
    groups = {}
    for group in dataclasses.fields(Config):
        own = {n.split(".")[1]: v for n, v in chosen.items() if n.split(".")[0] == group.name}
        groups[group.name] = typing.cast(type, group.type)(**own)
    return Config(**groups)


PAIR = tuple[int, int]


def kinds_of(setting: dataclasses.Field) -> tuple[type, ...]:
    """The types that a field may have."""
    kind = setting.type
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.cast(type, kind),)
    return tuple(dict if typing.get_origin(kind) is dict else kind for kind in kinds)


def from_value(value: Any, kinds: tuple[type, ...]) -> Any:
    """A Python value as one of these types; ValueError says what it must be."""
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueError("a finite number") from None
    if PAIR in kinds and isinstance(value, list | tuple) and [type(number) for number in value] == [int, int]:
        # JSON has lists alone.
        return tuple(value)
    if type(value) in kinds:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a finite number")
        return value
    raise ValueError(_kinds_text(kinds))


def from_text(text: str, kinds: tuple[type, ...]) -> Any:
    """A flag's text as one of these types."""
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError("true or false")
    if dict in kinds and text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"JSON where it begins with {{: {error}") from None
    if str in kinds:
        return text
    if PAIR in kinds:
        inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
        try:
            first, second = map(int, inner.split(","))
            return first, second
        except ValueError:
            raise ValueError(_kinds_text(kinds)) from None
    try:
        number = float(text)
        if int in kinds:
            if "e" not in text.lower():
                return int(text)
            if number == int(number):
                return int(number)
            raise ValueError
        if math.isfinite(number):
            return number
    except (ValueError, OverflowError):
        pass
    raise ValueError(_kinds_text(kinds))


def _kinds_text(kinds: tuple[type, ...]) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "a mapping",
    }
    names |= {PAIR: "two whole numbers, as in (5,8),", types.NoneType: "none"}
    return " or ".join(names[kind] for kind in kinds)
