"""The meaning of each setting of a config.json in this decoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.config_keys import WITHOUT_EFFECT
from model.interchange.family import Family
from model.interchange.huggingface import FAMILIES, Interchange

NO_EFFECT = "no effect on logits"
NOT_READ = "not a setting of this class"


def meanings(hf_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the meaning of each key, in words: our fields with their values, "no effect on logits", or a refusal.

    Where no key of the class is a field of ours by itself, the fields are those that change without the key.
    """
    family = next((family for family in FAMILIES if [family.architecture] == hf_config.get("architectures")), None)
    if family is None:
        return dict.fromkeys(hf_config, "")
    return {key: _meaning(family, hf_config, key) for key in hf_config}


def _meaning(family: Family, hf_config: Mapping[str, Any], key: str) -> str:
    direct = [entry for entry in (*family.keys, family.context) if entry.key == key]
    if key in ("architectures", "model_type"):
        return "the class"
    if direct:
        name = "data.segment_length" if direct[0] is family.context else f"model.{direct[0].field}"
        try:
            return f"{name} = {direct[0].read(hf_config)}"
        except ValueError as error:
            return f"refused: {error}"
    if key == "quantization_config" and family.quantization:
        settings = hf_config[key]
        is_read = isinstance(settings, Mapping) and settings.get("quant_method") == family.quantization
        return "read as float32" if is_read else "refused: quantized weights are not read"
    if key in WITHOUT_EFFECT or key in family.without_effect:
        return NO_EFFECT
    without = {name: value for name, value in hf_config.items() if name != key}
    given, left_out, odd = (_read(values) for values in (hf_config, without, {**without, key: object()}))
    if isinstance(given, str):
        return "" if isinstance(left_out, str) else f"refused: {given}"
    if isinstance(left_out, str):
        return "read, and cannot be left out"
    changed = [
        f"model.{field.name} = {getattr(given, field.name)}"
        for field in dataclasses.fields(ResolvedModelConfig)
        if getattr(given, field.name) != getattr(left_out, field.name) and field.name != "export_as"
    ]
    if changed:
        return ", ".join(changed)
    return NOT_READ if odd == given else "the default of the class"


def _read(hf_config: Mapping[str, Any]) -> ResolvedModelConfig | str:
    """Returns the model of a config.json, or the reason why there is none."""
    try:
        return Interchange.from_config(hf_config).config
    except ValueError as error:
        return str(error)
