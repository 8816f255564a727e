"""Google's Gemmas in Transformers: embeddings scaled by √D, and norms that multiply by 1 + w.

Of a model whose norms multiply by w, minus one is written, which loses the last bits of values below 0.5: less than
1e-7 of each.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ALIASES, ConfigKey, parse
from model.interchange.family import ANY
from model.interchange.layer_types import layer_type_keys, of_kinds, pattern_fields, read_layer_types
from model.interchange.rope import (
    rope_by_type_from_huggingface,
    rope_from_huggingface,
    rope_keys,
    rope_keys_by_type,
)

# In its files "gelu" also means the approximation, so the exact activation has no name.
ACTIVATIONS = {name: hf_name for name, hf_name in llama.ACTIVATIONS.items() if name != "gelu"}
ACTIVATION = llama.ACTIVATION._replace(
    default=ACTIVATIONS["gelu_tanh"], values=ACTIVATIONS, aliases={**ALIASES, "gelu": "gelu_tanh"}
)
# The key that some versions of Transformers read.
OLDER_KEY = ACTIVATION._replace(key="hidden_activation")


def gemma_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, and the activation under both names."""
    return rope_keys(config) | {OLDER_KEY.key: OLDER_KEY.write(config.activation)}


def gemma_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields. ValueError if the activation has two different names."""
    if hf_config.get(OLDER_KEY.key) is not None and OLDER_KEY.read(hf_config) != ACTIVATION.read(hf_config):
        raise ValueError(f"{ACTIVATION.key} and {OLDER_KEY.key} are not the same; leave out the one that is wrong")
    return rope_from_huggingface(hf_config)


GEMMA = replace(
    llama.LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=16),
        llama.HEAD_DIM._replace(default=256),
        ACTIVATION,
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
    ),
    context=llama.CONTEXT._replace(default=8192),
    choices={**llama.LLAMA.choices, **llama.NO_FEEDFORWARD_BIAS, "scale_embeddings": (True,), "norm_offset": ANY},
    limits={},
    always={"norm_offset": True},
    required={"use_bidirectional_attention": False},
    extra_keys=gemma_to_huggingface,
    extra_fields=gemma_from_huggingface,
)


def gemma2_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, the kinds of layers, and the number whose root divides q·k."""
    return rope_keys(config) | _kinds_and_scale(config)


def gemma2_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, pattern and scale; without `layer_types` every second layer is full."""
    return rope_from_huggingface(hf_config) | _pattern_and_scale(hf_config, period=2)


def gemma3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys by the type of layer, the kinds of layers, and the number whose root divides q·k."""
    older = {"rope_local_base_freq": config.window_rope_base or config.rope_base}
    return rope_keys_by_type(config) | older | _kinds_and_scale(config)


def gemma3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, pattern and scale; without `layer_types` every sixth layer is full."""
    pattern = _pattern_and_scale(hf_config, parse(hf_config, "sliding_window_pattern", int, 6))
    return rope_by_type_from_huggingface(hf_config, 1e6, 1e4, pattern, window_key="rope_local_base_freq") | pattern


def _kinds_and_scale(config: ResolvedModelConfig) -> dict[str, Any]:
    divisor = config.head_dim if config.attention_scale is None else config.attention_scale**-2
    divisor = round(divisor) if math.isclose(divisor, round(divisor), rel_tol=1e-12) else divisor
    return layer_type_keys(config) | {"query_pre_attn_scalar": divisor}


def _pattern_and_scale(hf_config: Mapping[str, Any], period: int) -> dict[str, Any]:
    layers, window = parse(hf_config, "num_hidden_layers", int), llama.WINDOW.read(hf_config)
    if period < 1:
        raise ValueError(f"sliding_window_pattern is {period}; it must be at least 1")
    letters = read_layer_types(hf_config, layers, "".join("SF"[(i + 1) % period == 0] for i in range(layers)))
    divisor = parse(hf_config, "query_pre_attn_scalar", float, 256.0)
    if not divisor > 0:
        raise ValueError(f"query_pre_attn_scalar is {divisor}; it must be above 0")
    scale = None if divisor == HEAD_DIM.read(hf_config) else divisor**-0.5
    return pattern_fields(letters, window) | {"attention_scale": scale}


NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "feedforward_norm",
    "post_feedforward_layernorm": "feedforward_output_norm",
}
HEAD_DIM = llama.HEAD_DIM._replace(default=256)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=4),
        HEAD_DIM,
        llama.ACTIVATION._replace(key="hidden_activation", default="gelu_pytorch_tanh"),
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
        ConfigKey("attn_logit_softcapping", "attention_softcap", float | None, 50.0),
        ConfigKey("final_logit_softcapping", "logit_softcap", float | None, 30.0),
    ),
    tensors=llama.with_norms(NORMS),
    choices=GEMMA.choices | {"norm_placement": ("both",), "attention_scale": ANY, "sliding_window": ANY},
    limits={"layer_pattern": of_kinds("FS")},
    extra_keys=gemma2_to_huggingface,
    extra_fields=gemma2_from_huggingface,
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=(*GEMMA2.keys[:-2], ConfigKey("final_logit_softcapping", "logit_softcap", float | None, None)),
    context=llama.CONTEXT._replace(default=131_072),
    choices=GEMMA2.choices | {"qk_norm": (True,), "window_rope_base": ANY, "window_rope_scaling": ANY},
    # Its attention takes no cap, whatever the config says.
    required={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    extra_keys=gemma3_to_huggingface,
    extra_fields=gemma3_from_huggingface,
    # The class writes it, and reads it without the underscore.
    without_effect=("_sliding_window_pattern",),
)
