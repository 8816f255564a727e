"""Reading the value of a field by its type: from Python, from JSON, or from a flag's text."""

import dataclasses
import json
import math
import types
import typing
from typing import Any

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
