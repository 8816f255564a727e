"""Rotary positions as `rope_parameters` of a config.json, in both directions."""

import math
from collections.abc import Mapping
from typing import Any

from model.config import HIGH_TURNS, ResolvedModelConfig, divisors
from model.interchange.config_keys import parse
from model.interchange.layer_types import FULL, WINDOW

# Transformers reads this key at the top level first.
ORIGINAL_CONTEXT = "original_max_position_embeddings"
# The part of a head's components that is rotated.
PART = "partial_rotary_factor"
# Keys of `rope_low_turns` and `rope_high_turns`.
TURN_KEYS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
# The length of yarn's cosines and sines, which follows from the factor if a file does not say it.
LENGTH = "attention_factor"
# Whether yarn's interpolation begins and ends at whole pairs.
TRUNCATE = "truncate"
# Longrope's divisors for rows up to the original context, and for longer ones.
FACTOR_KEYS = ("short_factor", "long_factor")


def rope_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the value of `rope_parameters`."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": config.rope_base}
    if scaling != "none":
        rope["factor"] = config.rope_factor
    if scaling in TURN_KEYS:
        low, high = TURN_KEYS[scaling]
        rope |= {low: config.rope_low_turns, high: config.rope_high_turns}
        rope[ORIGINAL_CONTEXT] = config.rope_original_context
    if scaling == "longrope":
        for key, numbers in zip(FACTOR_KEYS, (config.rope_short_divisors, config.rope_long_divisors), strict=True):
            rope[key] = divisors(numbers or "")
        rope[ORIGINAL_CONTEXT] = config.rope_original_context
    if not config.rope_truncate:
        rope[TRUNCATE] = False
    if config.rope_length is not None:
        rope[LENGTH] = config.rope_length
    if config.rope_dim != config.head_dim:
        rope[PART] = config.rope_dim / config.head_dim
    return rope


def rope_keys(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, repeated where older versions and other programs look for them."""
    rope = rope_to_huggingface(config)
    scaling = None if config.rope_scaling == "none" else rope
    part = {PART: rope[PART]} if PART in rope else {}
    return {"rope_theta": config.rope_base, "rope_scaling": scaling, "rope_parameters": rope} | part


def rope_keys_by_type(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys of a class with a rotation for each type of layer."""
    rope = rope_to_huggingface(config)
    base = config.window_rope_base or config.rope_base
    of_window = (rope if config.window_rope_scaling else {"rope_type": "default"}) | {"rope_theta": base}
    # Older versions read the keys of full attention at the top.
    return rope_keys(config) | {"rope_parameters": {FULL: rope, WINDOW: of_window}}


def rope_by_type_from_huggingface(
    hf_config: Mapping[str, Any],
    full_base: float,
    window_base: float,
    pattern: Mapping[str, Any],
    window_key: str = "rope_theta",
) -> dict[str, Any]:
    """Returns our rotary fields of a class with a rotation for each type of layer. ValueError as below.

    Args:
        full_base: base in a file that says none; `window_base` is that of layers with a window.
        pattern: the `pattern_fields`; without a window its rotation has no effect.
        window_key: key of the latter in older files, whose `rope_scaling` is for full attention alone.
    """
    by_type = hf_config.get("rope_parameters") or {}
    if not isinstance(by_type, Mapping) or not all(isinstance(of_type, Mapping) for of_type in by_type.values()):
        raise ValueError(f"rope_parameters is {by_type!r}; it must be a table of settings for each type of layer")
    top = {name: hf_config.get(name) for name in (ORIGINAL_CONTEXT, "rope_scaling", "rope_theta")}
    base = parse(hf_config, "rope_theta", float, full_base)
    full = rope_from_huggingface({**top, "rope_theta": base, "rope_parameters": by_type.get(FULL)})
    base = parse(hf_config, window_key, float, window_base)
    window = rope_from_huggingface({"rope_theta": base, "rope_parameters": by_type.get(WINDOW)})
    fields = dict(full)
    if pattern["sliding_window"] is None:
        return fields
    if window["rope_base"] != full["rope_base"]:
        fields["window_rope_base"] = window["rope_base"]
    if {**window, "rope_base": 0} != {**full, "rope_base": 0}:
        if "rope_scaling" in window:
            raise ValueError(f"rope_parameters.{WINDOW}: in this decoder it is unscaled, or scaled as {FULL} is")
        fields["window_rope_scaling"] = False
    return fields


def rope_from_huggingface(
    hf_config: Mapping[str, Any], head_dim: int | None = None, part: float = 1.0
) -> dict[str, Any]:
    """Returns our rotary fields. ValueError names scalings that this decoder does not have.

    Args:
        head_dim: width of a head, in a class that rotates a part of it; else all is rotated.
        part: the part in a file that says none.
    """
    # The older key wins, as in Transformers.
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; it must be a table of settings")
    part = parse(rope, PART, float, parse(hf_config, PART, float, part))
    fields: dict[str, Any] = {
        "rope_base": parse(rope, "rope_theta", float, parse(hf_config, "rope_theta", float, 10_000.0))
    }
    if head_dim is None and part != 1:
        raise ValueError(f"{PART}: in this decoder all components of a head are turned here")
    if head_dim is not None and part != 1:
        fields["rope_dim"] = int(head_dim * part)
    # Older files call it "type".
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type
    if rope_type not in ("default", "linear", "longrope", *TURN_KEYS):
        raise ValueError(f"rope_type is {rope_type}; this decoder has default, linear, llama3, yarn and longrope")
    known = {"rope_type", "type", "rope_theta", PART, "factor", ORIGINAL_CONTEXT}
    known |= {*TURN_KEYS.get(rope_type, ()), *([LENGTH] if rope_type in ("yarn", "longrope") else [])}
    known |= set(FACTOR_KEYS if rope_type == "longrope" else ()) | ({TRUNCATE} if rope_type == "yarn" else set())
    if others := [name for name in rope if name not in known and rope[name] is not None]:
        raise ValueError(f"rope_parameters.{others[0]}: this decoder has no such choice")
    if rope_type == "default":
        return fields
    if rope_type == "longrope":
        return fields | _longrope_fields(hf_config, rope)
    factor = parse(rope, "factor", float)
    fields |= {"rope_scaling": rope_type, "rope_factor": factor}
    if rope_type in TURN_KEYS:
        low, high = TURN_KEYS[rope_type]
        source = hf_config if hf_config.get(ORIGINAL_CONTEXT) else rope
        fields["rope_original_context"] = parse(source, ORIGINAL_CONTEXT, int)
        fields["rope_low_turns"] = parse(rope, low, float, 1.0)
        fields["rope_high_turns"] = parse(rope, high, float, HIGH_TURNS[rope_type])
    if rope_type == "yarn" and not parse(rope, TRUNCATE, bool, True):
        fields["rope_truncate"] = False
    if rope.get(LENGTH) is not None:
        length = 0.1 * math.log(max(factor, 1.0)) + 1
        if not math.isclose(parse(rope, LENGTH, float), length, rel_tol=1e-6):
            fields["rope_length"] = parse(rope, LENGTH, float)
    return fields


def _longrope_fields(hf_config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    source = hf_config if hf_config.get(ORIGINAL_CONTEXT) else rope
    original = parse(source, ORIGINAL_CONTEXT, int)
    if original < 2:
        raise ValueError(f"{ORIGINAL_CONTEXT} is {original}; it must be at least 2")
    factor = parse(hf_config, "max_position_embeddings", int, original) / original
    numbers = {}
    for key, field in zip(FACTOR_KEYS, ("rope_short_divisors", "rope_long_divisors"), strict=True):
        values = rope.get(key)
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"rope_parameters.{key} is {values!r}; it must be a list of numbers")
        numbers[field] = ",".join(str(float(value)) for value in values)
    fields = {"rope_scaling": "longrope", "rope_factor": max(parse(rope, "factor", float, factor), 1.0)}
    if rope.get(LENGTH) is not None:
        fields["rope_length"] = parse(rope, LENGTH, float)
    return fields | numbers | {"rope_original_context": original}
