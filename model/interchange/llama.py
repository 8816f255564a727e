"""Llama and its relatives in Transformers, Mistral and Qwen3: rotary positions, RMSNorm, a gated feed-forward."""

from collections.abc import Mapping
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.family import Family
from model.interchange.rope import rope_from_theirs, rope_to_theirs
from model.interchange.settings import ALSO, Setting, flag, number, whole_number, whole_or_none, word
from model.interchange.tensors import linear, plain

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SIZES = (
    Setting("vocab_size", "vocab_size", whole_number),
    Setting("hidden_size", "model_dim", whole_number),
    Setting("intermediate_size", "feedforward_dim", whole_number),
    Setting("num_hidden_layers", "num_layers", whole_number),
    Setting("num_attention_heads", "num_heads", whole_number),
    Setting("rms_norm_eps", "norm_epsilon", number, 1e-6),
    Setting("attention_dropout", "attention_dropout", number, 0.0),
)
# Null is as many as there are of queries.
KV_HEADS = Setting("num_key_value_heads", "num_kv_heads", whole_or_none)
HEAD = Setting("head_dim", "head_dim", whole_or_none)
ACTIVATION = Setting("hidden_act", "activation", word, "silu", ACTIVATIONS, ALSO)
TIED = Setting("tie_word_embeddings", "tie_embeddings", flag, False)
ATTENTION_BIAS = Setting("attention_bias", "attention_bias", flag, False)
WINDOW = Setting("sliding_window", "sliding_window", whole_or_none, 4096)
CONTEXT = Setting("max_position_embeddings", "max_positions", whole_number, 2048)

# The rows of a layer's linear maps: their name → ours.
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
    *(linear(f"{LAYER}{theirs}.weight", ours) for theirs, ours in PROJECTIONS.items()),
    *(plain(f"{LAYER}{theirs}.bias", f"{ours}_bias") for theirs, ours in PROJECTIONS.items()),
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
    """Their rotary settings, once more at the places where older versions, and other programs, look for them."""
    rope = rope_to_theirs(config)
    scaling = None if config.rope_scaling == "none" else rope
    return {"rope_theta": config.rope_base, "rope_scaling": scaling, "rope_parameters": rope}


def qwen3_to_theirs(config: ResolvedModelConfig) -> dict[str, Any]:
    """With a window all layers have it."""
    window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
    return rotary(config) | window | {"max_window_layers": 0}


def qwen3_from_theirs(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """ValueError where some layers have a window and others have none."""
    windowed, first = flag(theirs, "use_sliding_window", False), whole_number(theirs, "max_window_layers", 28)
    layers = whole_number(theirs, "num_hidden_layers")
    if theirs.get("layer_types"):
        # All are alike.
        first = 0 if theirs["layer_types"][0] == "sliding_attention" else layers
    if windowed and 0 < first < layers:
        raise ValueError("max_window_layers: in this decoder all layers have the sliding window, or none")
    return rope_from_theirs(theirs) | {"sliding_window": WINDOW.read(theirs) if windowed and first < layers else None}


LLAMA = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    first="model.",
    settings=(
        *SIZES, KV_HEADS, HEAD, ACTIVATION, TIED, ATTENTION_BIAS, Setting("mlp_bias", "feedforward_bias", flag, False)
    ),
    tensors=TENSORS,
    context=CONTEXT,
    choices=CHOICES | NO_WINDOW,
    # Its config checks this even where the width of a head is given.
    limits={"num_heads": lambda config: config.model_dim % config.num_heads == 0},
    more_to=rotary,
    more_from=rope_from_theirs,
    without=INVERSE_FREQUENCIES,
)  # fmt: skip
MISTRAL = Family(
    kind="mistral",
    architecture="MistralForCausalLM",
    first="model.",
    settings=(*SIZES, KV_HEADS._replace(default=8), HEAD, ACTIVATION, TIED, WINDOW),
    tensors=TENSORS,
    context=CONTEXT._replace(default=131_072),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"attention_bias": (False,)},
    more_to=rotary,
    more_from=rope_from_theirs,
    without=INVERSE_FREQUENCIES,
)
QWEN3 = Family(
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    first="model.",
    settings=(
        *SIZES, KV_HEADS._replace(default=32), HEAD._replace(default=128), ACTIVATION, TIED, ATTENTION_BIAS
    ),
    tensors=TENSORS,
    context=CONTEXT._replace(default=32_768),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"qk_norm": (True,)},
    more_to=qwen3_to_theirs,
    more_from=qwen3_from_theirs,
    without=INVERSE_FREQUENCIES,
)  # fmt: skip
