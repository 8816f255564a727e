"""Rotary positions as `rope_parameters` of a config.json, in both directions."""

from collections.abc import Mapping
from typing import Any

from model.config import HIGH_TURNS, ResolvedModelConfig
from model.interchange.config_keys import parse

# Transformers reads this key at the top level first.
ORIGINAL_CONTEXT = "original_max_position_embeddings"
# Keys of `rope_low_turns` and `rope_high_turns`.
TURN_KEYS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


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
    return rope


def rope_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our rotary fields. ValueError names scalings that this decoder does not have."""
    # The older key wins, as in Transformers.
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; it must be a table of settings")
    if parse(rope, "partial_rotary_factor", float, parse(hf_config, "partial_rotary_factor", float, 1.0)) != 1:
        raise ValueError("partial_rotary_factor: in this decoder all components of a head are turned")
    fields = {"rope_base": parse(rope, "rope_theta", float, parse(hf_config, "rope_theta", float, 10_000.0))}
    # Older files call it "type".
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", *TURN_KEYS):
        raise ValueError(f"rope_type is {rope_type}; this decoder has default, linear, llama3 and yarn")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", ORIGINAL_CONTEXT}
    known |= set(TURN_KEYS.get(rope_type, ()))
    if others := [name for name in rope if name not in known and rope[name] is not None]:
        raise ValueError(f"rope_parameters.{others[0]}: this decoder has no such choice")
    if rope_type == "default":
        return fields
    fields |= {"rope_scaling": rope_type, "rope_factor": parse(rope, "factor", float)}
    if rope_type in TURN_KEYS:
        low, high = TURN_KEYS[rope_type]
        source = hf_config if hf_config.get(ORIGINAL_CONTEXT) else rope
        fields["rope_original_context"] = parse(source, ORIGINAL_CONTEXT, int)
        fields["rope_low_turns"] = parse(rope, low, float, 1.0)
        fields["rope_high_turns"] = parse(rope, high, float, HIGH_TURNS[rope_type])
    return fields
