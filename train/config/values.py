"""Values of fields: their types, how a flag's text is parsed, and how wrong ones are shown."""

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from data.files.json_file import parse_json
from data.printable import printable_name

PAIR = tuple[int, int]
# Levels of a mapping, bits of a whole number, and characters of a wrong value that are shown.
MAX_DEPTH, MAX_BITS, MAX_SHOWN = 16, 1024, 100
PLAIN = (type(None), bool, int, float, str, list, tuple, dict)


def types_of(field: dataclasses.Field) -> tuple[type, ...]:
    """Returns the types that the value of a field may have."""
    annotation = field.type
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (typing.cast(type, annotation),)
    return tuple(dict if typing.get_origin(kind) is dict else kind for kind in kinds)


def check_value(value: Any, kinds: tuple[type, ...]) -> Any:
    """Returns a Python value as one of these types, or raises ValueError with the types in words."""
    if float in kinds and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if PAIR in kinds and isinstance(value, list | tuple) and [type(number) for number in value] == [int, int]:
        check_values(value)
        return tuple(value)  # JSON has no tuples
    if type(value) is str and dict in kinds and str not in kinds:
        return parse_text(value, kinds)  # a ConfigDict sorts the names of a mapping, and refuses those with dots
    if type(value) in kinds:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a finite number")
        check_values(value)
        return value
    raise ValueError(_kinds_text(kinds))


def parse_text(text: str, kinds: tuple[type, ...]) -> Any:
    """Parses the text of a flag as one of these types, or raises ValueError with the types in words."""
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if dict in kinds and text.startswith("{"):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise ValueError(f"JSON where it begins with {{: {error}") from None
        check_values(value)
        return value
    if str in kinds:
        return text
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        if PAIR in kinds:
            inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
            first, second = map(int, inner.split(","))
            return first, second
        if not {int, float} & set(kinds):
            raise ValueError
        number = float(text)
        if int not in kinds and math.isfinite(number):
            return number
        if int in kinds and "e" not in text.lower():
            return int(text)
        if int in kinds and number == int(number):
            return int(number)
    except (KeyError, ValueError, OverflowError):
        pass
    raise ValueError(_kinds_text(kinds))


def check_values(value: Any, depth: int = 0) -> None:
    """Raises ValueError if a value is nested too deeply, or is or holds anything that JSON cannot hold."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested at most {MAX_DEPTH} levels deep")
    if type(value) not in PLAIN:
        raise ValueError("made of texts, numbers, lists and mappings")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"a number of at most {MAX_BITS} bits")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    for inner in value if isinstance(value, list | tuple) else ():
        check_values(inner, depth + 1)


def _kinds_text(kinds: tuple[type, ...]) -> str:
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    names |= {PAIR: "two whole numbers, as in (5,8),", dict: "a mapping", types.NoneType: "none"}
    return " or ".join(names[kind] for kind in kinds)


def short_repr(value: Any) -> str:
    """Returns the repr of any value of a user, shortened."""
    try:
        text = repr(value)
    except BaseException as error:  # whatever the value's own type raises; or it is nested too deeply, or too long
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def shown_name(name: Any) -> str:
    """Returns the name of a group or field as a user's file has it: any value, shown on one line."""
    return printable_name(name)[:MAX_SHOWN] if type(name) is str else short_repr(name)


def nearest(name: str, names: list[str]) -> str:
    """Returns "; did you mean ...?" with the nearest of some names, or an empty text if none is near."""
    matches = difflib.get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    if not matches and "." in name:
        matches = [known for known in sorted(set(names)) if known.endswith("." + name.rsplit(".", 1)[1])]
    return f"; did you mean {matches[0]}?" if matches else ""
