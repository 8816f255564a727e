"""Llama and its relatives in Transformers, Mistral and Qwen3: rotary positions, RMSNorm, a gated feed-forward."""

from collections.abc import Mapping
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.config_keys import (
    ALSO,
    ConfigKey,
    parse_flag,
    parse_integer,
    parse_name,
    parse_number,
    parse_optional_integer,
)
from model.interchange.family import Family
from model.interchange.rope import rope_from_huggingface, rope_to_huggingface
from model.interchange.tensors import linear, plain

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SIZES = (
    ConfigKey("vocab_size", "vocab_size", parse_integer),
    ConfigKey("hidden_size", "model_dim", parse_integer),
    ConfigKey("intermediate_size", "feedforward_dim", parse_integer),
    ConfigKey("num_hidden_layers", "num_layers", parse_integer),
    ConfigKey("num_attention_heads", "num_heads", parse_integer),
    ConfigKey("rms_norm_eps", "norm_epsilon", parse_number, 1e-6),
    ConfigKey("attention_dropout", "attention_dropout", parse_number, 0.0),
)
# Null is as many as there are of queries.
KV_HEADS = ConfigKey("num_key_value_heads", "num_kv_heads", parse_optional_integer)
HEAD = ConfigKey("head_dim", "head_dim", parse_optional_integer)
ACTIVATION = ConfigKey("hidden_act", "activation", parse_name, "silu", ACTIVATIONS, ALSO)
TIED = ConfigKey("tie_word_embeddings", "tie_embeddings", parse_flag, False)
ATTENTION_BIAS = ConfigKey("attention_bias", "attention_bias", parse_flag, False)
WINDOW = ConfigKey("sliding_window", "sliding_window", parse_optional_integer, 4096)
CONTEXT = ConfigKey("max_position_embeddings", "max_positions", parse_integer, 2048)

# Our parameter by the name of a layer's linear map.
PROJECTIONS = {
    "self_attn.q_proj": "blocks.attention.query",
    "self_attn.k_proj": "blocks.attention.key",
    "self_attn.v_proj": "blocks.attention.value",
    "self_attn.o_proj": "blocks.attention.output",
    "mlp.gate_proj": "blocks.feedforward.gate",
    "mlp.up_proj": "blocks.feedforward.up",
    "mlp.down_proj": "blocks.feedforward.down",
}
LAYER = "model.layers.{layer}."
TENSORS = (
    plain("model.embed_tokens.weight", "embedding.table"),
    plain(LAYER + "input_layernorm.weight", "blocks.attention_norm.scale"),
    plain(LAYER + "post_attention_layernorm.weight", "blocks.feedforward_norm.scale"),
    plain(LAYER + "self_attn.q_norm.weight", "blocks.attention.query_norm.scale"),
    plain(LAYER + "self_attn.k_norm.weight", "blocks.attention.key_norm.scale"),
    *(linear(f"{LAYER}{name}.weight", parameter) for name, parameter in PROJECTIONS.items()),
    *(plain(f"{LAYER}{name}.bias", f"{parameter}_bias") for name, parameter in PROJECTIONS.items()),
    plain("model.norm.weight", "norm.scale"),
    linear("lm_head.weight", "unembedding.matrix"),
)
# Of a model that any of them can be.
CHOICES: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_placement": ("pre",),
    "gated": (True,),
    "scale_embeddings": (False, True),
    "attention_softcap": (None,),
    "qk_norm": (False,),
}
NO_FEEDFORWARD_BIAS = {"feedforward_bias": (False,)}
NO_WINDOW = {"sliding_window": (None,)}
INVERSE_FREQUENCIES = ("rotary_emb.inv_freq",)


def rotary(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, repeated where older versions and other programs look for them."""
    rope = rope_to_huggingface(config)
    scaling = None if config.rope_scaling == "none" else rope
    return {"rope_theta": config.rope_base, "rope_scaling": scaling, "rope_parameters": rope}


def qwen3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys and, with a window, that all layers have it."""
    window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
    return rotary(config) | window | {"max_window_layers": 0}


def qwen3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields. ValueError if only some layers have a window."""
    windowed, first = (
        parse_flag(hf_config, "use_sliding_window", False),
        parse_integer(hf_config, "max_window_layers", 28),
    )
    layers = parse_integer(hf_config, "num_hidden_layers")
    if hf_config.get("layer_types"):
        # All are alike.
        first = 0 if hf_config["layer_types"][0] == "sliding_attention" else layers
    if windowed and 0 < first < layers:
        raise ValueError("max_window_layers: in this decoder all layers have the sliding window, or none")
    return rope_from_huggingface(hf_config) | {
        "sliding_window": WINDOW.read(hf_config) if windowed and first < layers else None
    }


LLAMA = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    first="model.",
    keys=(
        *SIZES, KV_HEADS, HEAD, ACTIVATION, TIED, ATTENTION_BIAS, ConfigKey("mlp_bias", "feedforward_bias", parse_flag,
        False)
    ),
    tensors=TENSORS,
    context=CONTEXT,
    choices=CHOICES | NO_WINDOW,
    # Its config checks this even where the width of a head is given.
    limits={"num_heads": lambda config: config.model_dim % config.num_heads == 0},
    more_to=rotary,
    more_from=rope_from_huggingface,
    without=INVERSE_FREQUENCIES,
)  # fmt: skip
MISTRAL = Family(
    kind="mistral",
    architecture="MistralForCausalLM",
    first="model.",
    keys=(*SIZES, KV_HEADS._replace(default=8), HEAD, ACTIVATION, TIED, WINDOW),
    tensors=TENSORS,
    context=CONTEXT._replace(default=131_072),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"attention_bias": (False,)},
    more_to=rotary,
    more_from=rope_from_huggingface,
    without=INVERSE_FREQUENCIES,
)
QWEN3 = Family(
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    first="model.",
    keys=(
        *SIZES, KV_HEADS._replace(default=32), HEAD._replace(default=128), ACTIVATION, TIED, ATTENTION_BIAS
    ),
    tensors=TENSORS,
    context=CONTEXT._replace(default=32_768),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"qk_norm": (True,)},
    more_to=qwen3_to_huggingface,
    more_from=qwen3_from_huggingface,
    without=INVERSE_FREQUENCIES,
)  # fmt: skip
