"""Keys of a `config.json`: parsing their values, and the errors that name what is wrong with them."""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Our activations by further names in config.json, of functions that are equal up to rounding.
ALIASES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}

# Keys of all classes that have no effect on logits, which an import leaves out.
WITHOUT_EFFECT = frozenset(
    (
        # Where a file comes from, and in which dtype; the tensors have theirs.
        *("_name_or_path", "transformers_version", "dtype"),
        # The beginning of a training that is over.
        "initializer_range",
        # Generation, and tokens whose meaning is the tokenizer's.
        *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        # What a forward pass returns, in which type and with how much memory.
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "pretraining_tp"),
        # Tasks other than language modeling.
        *("id2label", "label2id", "problem_type", "is_encoder_decoder"),
    )
)


class ConfigKey(NamedTuple):
    """A key of config.json with the meaning of one of our fields.

    Attributes:
        kind: type of the value, as in `parse`.
        default: value in a file without the key; None if the key is required.
        values: value in config.json by value of the field, or None if the two are equal.
        aliases: value of the field by further values in config.json, which are only read.
        other_key: another name of the key, which is only read, and first.
    """

    key: str
    field: str
    kind: Any
    default: Any = None
    values: Mapping[str, str] | None = None
    aliases: Mapping[str, str] = MappingProxyType({})
    other_key: str = ""

    def read(self, hf_config: Mapping[str, Any]) -> Any:
        """Returns the value of our field. ValueError names what is wrong with that of config.json."""
        key = self.key if hf_config.get(self.other_key) is None else self.other_key
        value = parse(hf_config, key, self.kind, self.default)
        if self.values is None:
            return value
        fields = {**self.aliases, **{hf_value: field for field, hf_value in self.values.items()}}
        if value not in fields:
            raise ValueError(f"{key} is {value!r}; this decoder has {', '.join(fields)}")
        return fields[value]

    def write(self, value: Any) -> Any:
        """Returns the value in config.json for a value of our field."""
        return self.values[value] if self.values else value


def parse(hf_config: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """Returns a value of the kind bool, str, float, int or of one that allows None. ValueError says what it must be.

    A value that is missing or null is the default, but a null of `int | None` or `float | None` is None.
    """
    if kind in (int | None, float | None) and hf_config.get(name, default) is None:
        return None
    value = default if hf_config.get(name) is None else hf_config[name]
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}; it must be {'a name' if kind is str else 'true or false'}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < sys.float_info.max:
        raise ValueError(f"{name} is {value!r}; it must be a number")
    if kind in (float, float | None):
        return float(value)
    if value != int(value):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return int(value)
