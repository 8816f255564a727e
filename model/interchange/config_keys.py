"""Keys of a `config.json`: parsing their values, and the errors that name what is wrong with them."""

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Our activations by further names in config.json, of functions that are equal up to rounding.
ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
# Parses a value: (values of config.json, key, default or None if it is required).
Parse = Callable[[Mapping[str, Any], str, Any], Any]


class ConfigKey(NamedTuple):
    """A key of config.json with the meaning of one of our fields.

    Attributes:
        key: name of the key in config.json.
        field: name of the field of `ResolvedModelConfig`.
        parse: function that parses and checks the value.
        default: value in a file without the key; None if the key is required.
        values: value in config.json by value of the field, or None if the two are equal.
        aliases: value of the field by further values in config.json, which are only read.
    """

    key: str
    field: str
    parse: Parse
    default: Any = None
    values: Mapping[str, str] | None = None
    aliases: Mapping[str, str] = MappingProxyType({})

    def read(self, hf_config: Mapping[str, Any]) -> Any:
        """Returns the value of our field. ValueError names what is wrong with that of config.json."""
        value = self.parse(hf_config, self.key, self.default)
        if self.values is None:
            return value
        fields = {**self.aliases, **{hf_value: field for field, hf_value in self.values.items()}}
        if value not in fields:
            raise ValueError(f"{self.key} is {value!r}; this decoder has {', '.join(fields)}")
        return fields[value]

    def write(self, value: Any) -> Any:
        """Returns the value in config.json for a value of our field."""
        return self.values[value] if self.values else value


def parse_number(hf_config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a number; `default` if it is missing or null. ValueError if it is not a number."""
    value = hf_config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < sys.float_info.max:
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


def parse_integer(hf_config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Returns an integer, as `parse_number`."""
    if (value := parse_number(hf_config, name, default)) != int(value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def parse_optional_integer(hf_config: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """Returns an integer or None for null; `default` if it is missing."""
    return None if hf_config.get(name, default) is None else parse_integer(hf_config, name, default)


def parse_flag(hf_config: Mapping[str, Any], name: str, default: bool) -> bool:
    """Returns a boolean; `default` if it is missing or null."""
    value = default if hf_config.get(name) is None else hf_config[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def parse_name(hf_config: Mapping[str, Any], name: str, default: str) -> str:
    """Returns a text; `default` if it is missing or null."""
    value = default if hf_config.get(name) is None else hf_config[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a name")
    return value
