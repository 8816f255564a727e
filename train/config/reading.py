"""Makes a config from the values of a preset, a file or a run, and from flags."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from data.errors import InputError
from data.files.json_file import parse_json
from data.printable import name_problem, printable_name
from train.config.config import Config, config_fields

# Fields that may hold any text; all other texts are names.
TEXTS = ("train.on_event", "evaluation.prompt", "data.text_separator", "data.text_field", "data.prompt_field")


def make_config(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Makes a config from a preset's values and the command line's.

    Args:
        values: {group: {field: value}}; fields that are missing keep their defaults.
        overrides: {"group.field": text}, parsed by the field's type; they win.

    Raises:
        InputError: names every unknown field, wrong type and impossible combination, one on each line.
    """
    problems: list[str] = []
    known = {f"{group}.{name}": field for group, name, field in config_fields()}
    kinds: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(Config)}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in kinds}
    from_preset: dict[str, Any] = {}
    for group, fields in values.items():
        if group not in chosen:
            group = shown_name(group)
            problems.append(f"{group}: there is no such group{nearest(group, list(chosen))}")
        elif not isinstance(fields, dict):
            example = next(name for name in known if name.startswith(group + "."))
            problems.append(f"{group} is {short_repr(fields)}; it must hold fields, as in {example}")
        else:
            from_preset |= {f"{group}.{shown_name(name)}": value for name, value in fields.items()}
    for source, parse in ((from_preset, check_value), (overrides or {}, parse_text)):
        for name, value in source.items():
            if name not in known:
                problems.append(f"{name}: there is no such field{nearest(name, list(known))}")
                continue
            group, field = name.split(".")
            try:
                chosen[group][field] = parse(value, types_of(known[name]))
            except ValueError as error:
                problems.append(f"{name} is {short_repr(value)}; it must be {error}")

    config = Config(**{group: kind(**chosen[group]) for group, kind in kinds.items()})
    problems += config_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    return config


def config_problems(config: Config) -> list[str]:
    """Returns one line for every value that is impossible alone or with others, naming fields and a remedy."""
    c = config
    groups = (c.model, c.data, c.tokenizer, c.mesh, c.train, c.checkpoint, c.recovery, c.evaluation)
    problems = [problem for group in groups for problem in group.problems()]
    problems += c.optimizer.problems(c.train.num_steps)
    for group, name, _ in config_fields():
        field = f"{group}.{name}"
        if field in TEXTS or any(known.startswith((f"{field} ", f"{field}[", f"{field}:")) for known in problems):
            continue
        texts = _texts_in(getattr(getattr(c, group), name))
        problems += [f"{field} {problem}" for problem in map(name_problem, texts) if problem][:1]
    if c.model.max_positions and c.model.max_positions < c.data.segment_length:
        problems.append(
            f"model.max_positions = {c.model.max_positions} is less than data.segment_length = "
            f"{c.data.segment_length}; raise it, or leave it at none"
        )
    first = "batch_size" if c.train.batch_ramp_start is None else "batch_ramp_start"
    rows = getattr(c.train, first)
    if c.num_streams >= 1 and 1 <= rows <= 2**24 and rows % c.num_streams:
        nearest = min(divisors(rows), key=lambda d: abs(d - c.num_streams))
        problems.append(
            f"data.num_streams = {c.num_streams} does not divide train.{first} = {rows}; nearest that does: {nearest}"
        )
    return problems


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number in order, after as many trials as its root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


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


def _texts_in(value: Any) -> list[str]:
    """Returns a text, or all texts in a mapping."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts_in(part)]
    return [value] if isinstance(value, str) else []


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
