"""Rotary positions as `rope_parameters` of a config.json, both ways."""

from collections.abc import Mapping
from typing import Any

from model.config import HIGH_TURNS, ResolvedModelConfig
from model.interchange.settings import number, whole_number

# Transformers reads it beside the others first.
ORIGINAL = "original_max_position_embeddings"
# Their names of `rope_low_turns` and `rope_high_turns`.
TURNS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


def rope_to_theirs(config: ResolvedModelConfig) -> dict[str, Any]:
    """Their `rope_parameters`."""
    scaling = config.rope_scaling
    theirs: dict[str, Any] = {
        "rope_type": "default" if scaling == "none" else scaling,
        "rope_theta": config.rope_base,
    }
    if scaling != "none":
        theirs["factor"] = config.rope_factor
    if scaling in TURNS:
        low, high = TURNS[scaling]
        theirs |= {low: config.rope_low_turns, high: config.rope_high_turns}
        theirs[ORIGINAL] = config.rope_original_context
    return theirs


def rope_from_theirs(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our rotary fields from their config. ValueError names what our scalings do not have."""
    # The older name goes first, as in Transformers.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; it must be a table of settings")
    if number(rope, "partial_rotary_factor", number(theirs, "partial_rotary_factor", 1.0)) != 1:
        raise ValueError("partial_rotary_factor: in this decoder all components of a head are turned")
    ours: dict[str, Any] = {"rope_base": number(rope, "rope_theta", number(theirs, "rope_theta", 10_000.0))}
    # Older files call it "type".
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", *TURNS):
        raise ValueError(f"rope_type is {kind}; this decoder has default, linear, llama3 and yarn")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", ORIGINAL, *TURNS.get(kind, ())}
    if others := [name for name in rope if name not in known and rope[name] is not None]:
        raise ValueError(f"rope_parameters.{others[0]}: this decoder has no such choice")
    if kind == "default":
        return ours
    ours |= {"rope_scaling": kind, "rope_factor": number(rope, "factor")}
    if kind in TURNS:
        low, high = TURNS[kind]
        ours["rope_original_context"] = whole_number(theirs if theirs.get(ORIGINAL) else rope, ORIGINAL)
        ours["rope_low_turns"] = number(rope, low, 1.0)
        ours["rope_high_turns"] = number(rope, high, HIGH_TURNS[kind])
    return ours
