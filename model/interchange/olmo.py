"""Ai2's OLMo 2 and 3 in Transformers: each branch's output is normed before the sum, queries and keys over all heads.

OLMo 3 adds a window, by default on three of four layers, and scales the rotations of the others alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ConfigKey, parse
from model.interchange.family import ANY
from model.interchange.layer_types import layer_type_keys, of_kinds, pattern_fields, read_layer_types
from model.interchange.rope import rope_by_type_from_huggingface, rope_keys_by_type

NORMS = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "feedforward_norm"}
EPSILON = ConfigKey("rms_norm_eps", "norm_epsilon", float, 1e-5)
SIZES = tuple(EPSILON if key.field == "norm_epsilon" else key for key in llama.SIZES)


def olmo3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys by the type of layer, and the types."""
    return rope_keys_by_type(config) | layer_type_keys(config)


def olmo3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern; without `layer_types` every fourth layer is full."""
    layers, window = parse(hf_config, "num_hidden_layers", int), llama.WINDOW.read(hf_config)
    letters = read_layer_types(hf_config, layers, ("SSSF" * layers)[:layers])
    pattern = pattern_fields(letters, window)
    base = parse(hf_config, "rope_theta", float, 500_000.0)
    return rope_by_type_from_huggingface(hf_config, base, base, pattern) | pattern


OLMO2 = replace(
    llama.LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=(*SIZES, llama.KV_HEADS, llama.HEAD_DIM, llama.ACTIVATION, llama.TIED, llama.ATTENTION_BIAS),
    tensors=llama.with_norms(NORMS),
    choices={
        **llama.LLAMA.choices,
        **llama.NO_FEEDFORWARD_BIAS,
        "norm_placement": ("output",),
        "qk_norm": (True,),
        "qk_norm_over": ("all_heads",),
    },
    limits={},
)
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=(*OLMO2.keys, llama.WINDOW),
    choices={name: values for name, values in OLMO2.choices.items() if name != "sliding_window"}
    | {"window_rope_base": ANY, "window_rope_scaling": ANY},
    limits={"layer_pattern": of_kinds("FS")},
    extra_keys=olmo3_to_huggingface,
    extra_fields=olmo3_from_huggingface,
)
