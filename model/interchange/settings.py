"""The values of a `config.json`: how they are read, and said what is wrong with them."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Other names of functions that are ours but for rounding.
ALSO = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
# How a value is read: the settings, its name, and what a file without it means (none: it must be there).
Kind = Callable[[Mapping[str, Any], str, Any], Any]


class Setting(NamedTuple):
    """One of their settings, and our field of the same meaning.

    Attributes:
        theirs: its name.
        ours: of `ResolvedModelConfig`.
        kind: how it is read.
        default: what a file without it means; none: it must be there.
        names: our value → theirs, for those that have names.
        also: other names of theirs → our value, which are read alone.
    """

    theirs: str
    ours: str
    kind: Kind
    default: Any = None
    names: Mapping[str, str] | None = None
    also: Mapping[str, str] = MappingProxyType({})

    def read(self, theirs: Mapping[str, Any]) -> Any:
        """Our value. ValueError says what is wrong with theirs."""
        found = self.kind(theirs, self.theirs, self.default)
        if self.names is None:
            return found
        ours = {**self.also, **{name: value for value, name in self.names.items()}}
        if found not in ours:
            raise ValueError(f"{self.theirs} is {found!r}; this decoder has {', '.join(ours)}")
        return ours[found]

    def written(self, value: Any) -> Any:
        """Their value of ours."""
        return self.names[value] if self.names else value


def number(theirs: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A setting that is a number; `default` where it is missing or null. ValueError where it is none."""
    found = theirs.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < sys.float_info.max:
        raise ValueError(f"{name} is {found!r}; it must be a number")
    return float(found)


def whole_number(theirs: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A setting that is a whole number, as of `number`."""
    if (found := number(theirs, name, default)) != int(found):
        raise ValueError(f"{name} is {found!r}; it must be a whole number")
    return int(found)


def whole_or_none(theirs: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A setting that is a whole number or null; `default` where it is missing."""
    return None if theirs.get(name, default) is None else whole_number(theirs, name, default)


def flag(theirs: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; `default` where it is missing or null."""
    found = default if theirs.get(name) is None else theirs[name]
    if not isinstance(found, bool):
        raise ValueError(f"{name} is {found!r}; it must be true or false")
    return found


def word(theirs: Mapping[str, Any], name: str, default: str) -> str:
    """A setting that is a name; `default` where it is missing or null."""
    found = default if theirs.get(name) is None else theirs[name]
    if not isinstance(found, str):
        raise ValueError(f"{name} is {found!r}; it must be a name")
    return found
