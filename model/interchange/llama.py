"""Llama and its relatives in Transformers, Mistral and Qwen3: rotary positions, RMSNorm, a gated feed-forward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.config_keys import ALIASES, ConfigKey, parse
from model.interchange.family import Family
from model.interchange.rope import rope_from_huggingface, rope_to_huggingface
from model.interchange.tensors import same_layout, torch_linear

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SIZES = (
    ConfigKey("vocab_size", "vocab_size", int),
    ConfigKey("hidden_size", "model_dim", int),
    ConfigKey("intermediate_size", "feedforward_dim", int),
    ConfigKey("num_hidden_layers", "num_layers", int),
    ConfigKey("num_attention_heads", "num_heads", int),
    ConfigKey("rms_norm_eps", "norm_epsilon", float, 1e-6),
    ConfigKey("attention_dropout", "attention_dropout", float, 0.0),
)
# Null means the number of query heads.
KV_HEADS = ConfigKey("num_key_value_heads", "num_kv_heads", int | None)
HEAD_DIM = ConfigKey("head_dim", "head_dim", int | None)
ACTIVATION = ConfigKey("hidden_act", "activation", str, "silu", ACTIVATIONS, ALIASES)
TIED = ConfigKey("tie_word_embeddings", "tie_embeddings", bool, False)
ATTENTION_BIAS = ConfigKey("attention_bias", "attention_bias", bool, False)
FEEDFORWARD_BIAS = ConfigKey("mlp_bias", "feedforward_bias", bool, False)
WINDOW = ConfigKey("sliding_window", "sliding_window", int | None, 4096)
CONTEXT = ConfigKey("max_position_embeddings", "max_positions", int, 2048)

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
    same_layout("model.embed_tokens.weight", "embedding.table"),
    same_layout(LAYER + "input_layernorm.weight", "blocks.attention_norm.scale"),
    same_layout(LAYER + "post_attention_layernorm.weight", "blocks.feedforward_norm.scale"),
    same_layout(LAYER + "self_attn.q_norm.weight", "blocks.attention.query_norm.scale"),
    same_layout(LAYER + "self_attn.k_norm.weight", "blocks.attention.key_norm.scale"),
    *(torch_linear(f"{LAYER}{name}.weight", parameter) for name, parameter in PROJECTIONS.items()),
    *(same_layout(f"{LAYER}{name}.bias", f"{parameter}_bias") for name, parameter in PROJECTIONS.items()),
    same_layout("model.norm.weight", "norm.scale"),
    torch_linear("lm_head.weight", "unembedding.matrix"),
)
# Choices that all of these classes have.
CHOICES: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_placement": ("pre",),
    "gated": (True,),
    "attention_softcap": (None,),
    "qk_norm": (False,),
}
NO_FEEDFORWARD_BIAS = {"feedforward_bias": (False,)}


def rope_keys(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, repeated where older versions and other programs look for them."""
    rope = rope_to_huggingface(config)
    scaling = None if config.rope_scaling == "none" else rope
    return {"rope_theta": config.rope_base, "rope_scaling": scaling, "rope_parameters": rope}


def qwen3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys and, with a window, that all layers have it."""
    window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
    return rope_keys(config) | window | {"max_window_layers": 0}


def qwen3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields. ValueError if only some layers have a window."""
    windowed = parse(hf_config, "use_sliding_window", bool, False)
    first = parse(hf_config, "max_window_layers", int, 28)
    layers = parse(hf_config, "num_hidden_layers", int)
    if hf_config.get("layer_types"):
        # This key wins, and all of its values are equal.
        first = 0 if hf_config["layer_types"][0] == "sliding_attention" else layers
    if windowed and 0 < first < layers:
        raise ValueError("max_window_layers: in this decoder all layers have the sliding window, or none")
    window = WINDOW.read(hf_config) if windowed and first < layers else None
    return rope_from_huggingface(hf_config) | {"sliding_window": window}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    keys=(*SIZES, KV_HEADS, HEAD_DIM, ACTIVATION, TIED, ATTENTION_BIAS, FEEDFORWARD_BIAS),
    tensors=TENSORS,
    context=CONTEXT,
    choices=CHOICES | {"sliding_window": (None,)},
    # The class checks this even if head_dim is given.
    limits={"num_heads": lambda config: config.model_dim % config.num_heads == 0},
    extra_keys=rope_keys,
    extra_fields=rope_from_huggingface,
    ignored=("rotary_emb.inv_freq",),
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(*SIZES, KV_HEADS._replace(default=8), HEAD_DIM, ACTIVATION, TIED, WINDOW),
    context=CONTEXT._replace(default=131_072),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"attention_bias": (False,)},
    limits={},
)
QWEN3 = replace(
    MISTRAL,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(*SIZES, KV_HEADS._replace(default=32), HEAD_DIM._replace(default=128), ACTIVATION, TIED, ATTENTION_BIAS),
    context=CONTEXT._replace(default=32_768),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"qk_norm": (True,)},
    extra_keys=qwen3_to_huggingface,
    extra_fields=qwen3_from_huggingface,
)
