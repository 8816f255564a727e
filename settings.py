"""Declares config fields in one table: default, help, bounds, choices, and whether a resumed run may change them.

Every config of the project is a frozen dataclass whose fields are `setting`s. Bounds and choices are checked here and
shown by `--help`, so that the two cannot disagree; rules that involve several fields are functions of each config.
Imports the standard library alone, since both `model` and `data` use it.
"""

import copy
import dataclasses
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
# Steps are counted in 32 bits on the devices; a whole number without a bound of its own has this one.
MOST_INTEGER = 2**31 - 1
WITHIN = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def setting(
    default: T,
    help: str,
    *,
    resume: str = "frozen",
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    unset: str = "",
    allows_nul: bool = False,
) -> T:
    """Declares a dataclass field.

    Args:
        default: value of a config that does not set the field; a dictionary is copied for each config.
        help: one clause with units.
        resume: the effect of a change to the field on resume: "frozen" refuses it, "warn" accepts it with a
            warning, "free" accepts it silently.
        above: exclusive lower bound; `below` is the upper one.
        choices: all values allowed, for a text.
        unset: the meaning of a default of None, in words.
        allows_nul: true for a text that may hold NUL characters; names of files and fields may not.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    metadata: dict[str, Any] = {"help": help, "resume": resume, "choices": choices, "bounds": bounds, "unset": unset}
    metadata["allows_nul"] = allows_nul
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Returns the default of a field, also of one with a factory."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def choices_of(config: type, name: str) -> tuple[str, ...]:
    """Returns the values that a field of a config may have."""
    return next(field.metadata["choices"] for field in dataclasses.fields(config) if field.name == name)


def bounds_text(field: dataclasses.Field) -> str:
    """Returns the bounds of a field in words, as in "at least 1", or an empty text without bounds."""
    b = {name: bound for name, bound in field.metadata["bounds"].items() if bound is not None}
    match sorted(b):
        case ["at_least", "at_most"]:
            return f"from {b['at_least']} to {b['at_most']}"
        case ["at_least", "below"]:
            return f"in [{b['at_least']}, {b['below']})"
        case [name]:
            return f"{name.replace('_', ' ')} {b[name]}"
    assert not b, f"{field.name}: no words for bounds {b}"
    return ""


def problems_of(group: str, config: Any) -> list[str]:
    """Returns one line for every field of a config that is outside its bounds or choices.

    Args:
        group: name of the config in flags, as in "model" of `--config.model.num_layers`.
        config: a dataclass of settings.
    """
    problems = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        shown = f"{value:.6g}" if isinstance(value, int) and value > 2**63 else value
        choices = field.metadata["choices"]
        if choices and value not in choices:
            problems.append(f"{group}.{field.name} is {value!r}; it must be one of {', '.join(choices)}")
        elif not all(bound is None or WITHIN[name](value, bound) for name, bound in field.metadata["bounds"].items()):
            problems.append(f"{group}.{field.name} is {shown}; it must be {bounds_text(field)}")
        elif isinstance(value, int) and field.metadata["bounds"]["at_most"] is None and value > MOST_INTEGER:
            problems.append(f"{group}.{field.name} is {shown}; it must be at most {MOST_INTEGER}")
        if problem := text_problem(value, allows_nul=field.metadata["allows_nul"]):
            problems.append(f"{group}.{field.name}{problem}")
    return problems


def text_problem(value: Any, allows_nul: bool = False) -> str:
    """Returns where in a value a text cannot be used, and why, as in "['a'] is not valid UTF-8"; empty if nowhere."""
    if isinstance(value, str):
        if "\0" in value and not allows_nul:
            return " holds a NUL character, which no name can have; leave it out"
        return "" if value.encode(errors="ignore").decode() == value else " is not valid UTF-8"
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inner = [*((key, key) for key in value), *value.items()]
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))
    problems = ((key, text_problem(of_key, allows_nul)) for key, of_key in inner)
    return next((f"[{key!r}]{problem}" for key, problem in problems if problem), "")


def unused_problems(group: str, config: Any, unused: Mapping[str, str]) -> list[str]:
    """Returns one line for every field that is set but has no effect; `unused` has the choice that makes it useless."""
    return [
        f"{group}.{field.name} has no effect with {unused[field.name]}; "
        f"leave it at {'none' if field.default is None else field.default}"
        for field in dataclasses.fields(config)
        if field.name in unused and getattr(config, field.name) != field.default
    ]


def help_of(field: dataclasses.Field) -> str:
    """Returns the help of a field with its bounds and default, for `--help`."""
    bounds = bounds_text(field)
    default = default_of(field)
    if isinstance(default, bool):
        default = str(default).lower()
    usual = field.metadata["unset"] if default is None else default
    return f"{field.metadata['help']}{bounds and f'; {bounds}'} (default: {usual})"


def kind_of(field: dataclasses.Field) -> str:
    """Returns the values that a flag of a field takes, for `--help`: its choices, or the kind of its type."""
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false", dict: "JSON", tuple: "FIRST,LAST"}
    kind: Any = field.type
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return "|".join(names.get(typing.get_origin(k) or k, "none") for k in kinds)
