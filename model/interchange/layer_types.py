"""Kinds of layers in a config.json: `layer_types`, one name a layer, and our `layer_pattern`.

Small letters of a pattern are dense layers among experts, and attend as capital ones do.
"""

from collections.abc import Mapping
from typing import Any

from model.config import DEFAULT_PATTERN, ResolvedModelConfig
from model.layers import layer_kinds

FULL, WINDOW = "full_attention", "sliding_attention"
# The letter of each type, in classes whose layers rotate wherever they attend to.
LETTERS = {FULL: "F", WINDOW: "S"}


def letters_of(config: ResolvedModelConfig) -> str:
    """Returns the capital letter of every layer, as `model.layers.layer_kinds` reads the pattern."""
    pattern = config.layer_pattern or DEFAULT_PATTERN[config.sliding_window is not None]
    return (pattern * config.num_layers)[: config.num_layers].upper()


def dense_numbers(config: ResolvedModelConfig) -> list[int]:
    """Returns the numbers of the dense layers, from 0 on."""
    return [number for number, kind in enumerate(layer_kinds(config)) if not kind.experts]


def of_kinds(letters: str) -> Any:
    """Returns a predicate of a config: all of its layers are of these kinds."""
    return lambda config: set(letters_of(config)) <= set(letters)


def of_one_kind(config: ResolvedModelConfig) -> bool:
    """True if all layers are alike, or differ by `dense_layers` alone, and have positions."""
    return has_capitals(config) and set(letters_of(config)) in ({"F"}, {"S"})


def has_capitals(config: ResolvedModelConfig) -> bool:
    """True if dense layers among experts, if any, are the first ones, as `dense_layers` says."""
    return (config.layer_pattern or "").upper() == (config.layer_pattern or "")


def write_layer_types(config: ResolvedModelConfig, letters: Mapping[str, str] = LETTERS) -> list[str]:
    """Returns the type of each layer."""
    types = {letter: layer_type for layer_type, letter in letters.items()}
    return [types[letter] for letter in letters_of(config)]


def layer_type_keys(config: ResolvedModelConfig, letters: Mapping[str, str] = LETTERS) -> dict[str, Any]:
    """Returns the type of each layer and the window, which these classes need even if no layer has it."""
    return {"layer_types": write_layer_types(config, letters), "sliding_window": config.sliding_window or 4096}


def read_layer_types(
    hf_config: Mapping[str, Any], num_layers: int, default: str, letters: Mapping[str, str] = LETTERS
) -> str:
    """Returns the letter of each layer. ValueError names types that the class has not.

    Args:
        default: the letters of a file without the key.
        letters: letter by type.
    """
    types = hf_config.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"layer_types is {types!r}; it must name the type of each of {num_layers} layers")
    for i, layer_type in enumerate(types):
        if layer_type not in letters:
            raise ValueError(f"layer_types[{i}] is {layer_type!r}; this decoder has {' and '.join(letters)} here")
    return "".join(letters[layer_type] for layer_type in types)


def pattern_fields(letters: str, window: int | None) -> dict[str, Any]:
    """Returns `layer_pattern`, the shortest that repeats to these letters, and `sliding_window`.

    ValueError if layers have a window without a length.
    """
    if "S" not in letters.upper():
        window = None
    elif window is None:
        raise ValueError("layer_types has sliding_attention, and there is no sliding_window")
    pattern = next(
        letters[:size]
        for size in range(1, len(letters) + 1)
        if (letters[:size] * len(letters))[: len(letters)] == letters
    )
    return {"layer_pattern": None if pattern in DEFAULT_PATTERN else pattern, "sliding_window": window}
