"""Llama and its relatives in Transformers: rotary positions, RMSNorm before each branch, a gated feed-forward."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.config_keys import ALIASES, ConfigKey, parse
from model.interchange.family import ANY, Choices, Family
from model.interchange.layer_types import (
    FULL,
    layer_type_keys,
    letters_of,
    of_kinds,
    pattern_fields,
    read_layer_types,
    write_layer_types,
)
from model.interchange.rope import ORIGINAL_CONTEXT, PART, rope_from_huggingface, rope_keys
from model.interchange.tensors import Tensor, same_layout, torch_linear

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
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
# Here null means none, which a missing key does not.
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


def with_norms(names: Mapping[str, str], bias: bool = False) -> tuple[Tensor, ...]:
    """Returns Llama's tensors with other norms in a layer.

    Args:
        names: our names of a block's norms, by those in the file.
        bias: all norms have one.
    """
    norms = {f"{LAYER}{name}": f"blocks.{ours}" for name, ours in names.items()}
    others = [tensor for tensor in TENSORS if "layernorm" not in tensor.name]
    ends = [("weight", "scale"), *([("bias", "bias")] if bias else [])]
    layer_norms = [same_layout(f"{name}.{end}", f"{ours}.{part}") for name, ours in norms.items() for end, part in ends]
    last = [same_layout("model.norm.bias", "norm.bias")] if bias else []
    return (others[0], *layer_norms, *others[1:-1], *last, others[-1])


def adjacent(tensor: Tensor) -> Tensor:
    """Returns the tensor of a class that rotates adjacent components of queries and keys."""
    rotated = tensor.parameters[0].startswith(("blocks.attention.query", "blocks.attention.key"))
    return tensor._replace(pairs=tensor.parameters) if rotated else tensor


def fused(tensors: tuple[Tensor, ...], qkv: bool = False, gate_up: bool = False) -> tuple[Tensor, ...]:
    """Returns the tensors of a class with one matrix for queries, keys and values, or for gate and up."""
    replaced: dict[str, Tensor | None] = {}
    if qkv:
        heads = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
        replaced |= dict.fromkeys(heads) | {heads[0]: torch_linear(f"{LAYER}self_attn.qkv_proj.weight", *heads)}
    if gate_up:
        both = ("blocks.feedforward.gate", "blocks.feedforward.up")
        replaced |= dict.fromkeys(both) | {both[0]: torch_linear(f"{LAYER}mlp.gate_up_proj.weight", *both)}
    chosen = (replaced.get(tensor.parameters[0], tensor) for tensor in tensors)
    return tuple(tensor for tensor in chosen if tensor)


# Choices that all of these classes have.
CHOICES: Choices = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_placement": ("pre",),
    "gated": (True,),
    "qk_norm": (False,),
}
NO_FEEDFORWARD_BIAS: Choices = {"feedforward_bias": (False,)}


def qwen_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, the window, and the layers that have it."""
    types = {
        "layer_types": write_layer_types(config),
        "max_window_layers": letters_of(config).find("S") % (config.num_layers + 1),
    }
    window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
    return rope_keys(config) | window | types


def qwen_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, and the layers that have a window: without `layer_types`, those from a certain one on."""
    layers = parse(hf_config, "num_hidden_layers", int)
    first = parse(hf_config, "max_window_layers", int, 28)
    window = WINDOW.read(hf_config) if parse(hf_config, "use_sliding_window", bool, False) else None
    default = "F" * layers if window is None else ("F" * min(first, layers)).ljust(layers, "S")
    letters = read_layer_types(hf_config, layers, default)
    return rope_from_huggingface(hf_config) | pattern_fields(letters, window)


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
    limits={"layer_pattern": of_kinds("FS")},
    extra_keys=qwen_to_huggingface,
    extra_fields=qwen_from_huggingface,
)
QWEN2 = replace(
    QWEN3,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=(*SIZES, KV_HEADS._replace(default=32), HEAD_DIM, ACTIVATION, TIED),
    choices=CHOICES | NO_FEEDFORWARD_BIAS | {"attention_bias": (True,), "attention_output_bias": (False,)},
    limits={**QWEN3.limits, "attention_output_bias": ANY},
)


def ministral_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys and the type of each layer."""
    return rope_keys(config) | layer_type_keys(config)


def ministral_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern; without `layer_types` all layers have the window, if there is one."""
    layers, window = parse(hf_config, "num_hidden_layers", int), WINDOW.read(hf_config)
    letters = read_layer_types(hf_config, layers, ("F" if window is None else "S") * layers)
    return rope_from_huggingface(hf_config) | pattern_fields(letters, window)


def smollm3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, and the layers that have no positions."""
    rotates = [int(letter != "N") for letter in letters_of(config)]
    windows = {"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL] * config.num_layers}
    return rope_keys(config) | windows | {"no_rope_layers": rotates}


def smollm3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern. ValueError if a layer has a window."""
    layers = parse(hf_config, "num_hidden_layers", int)
    read_layer_types(hf_config, layers, "", {FULL: "F"})
    interval = parse(hf_config, "no_rope_layer_interval", int, 4)
    rotates = hf_config.get("no_rope_layers")
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(layers)] if interval > 0 else [1] * layers
    if not isinstance(rotates, list) or len(rotates) != layers or any(value not in (0, 1) for value in rotates):
        raise ValueError(f"no_rope_layers is {rotates!r}; it must be 1 or 0 for each of {layers} layers")
    rope = rope_from_huggingface({**hf_config, "rope_theta": parse(hf_config, "rope_theta", float, 2e6)})
    return rope | pattern_fields("".join("NF"[bool(value)] for value in rotates), None)


def phi3_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, of a part of each head."""
    heads = parse(hf_config, "num_attention_heads", int)
    head_dim = HEAD_DIM.read(hf_config) or parse(hf_config, "hidden_size", int) // max(heads, 1)
    if "factor" in (hf_config.get("rope_parameters") or {}):
        raise ValueError("rope_parameters.factor: in this class it follows from the positions")
    return rope_from_huggingface({ORIGINAL_CONTEXT: 4096, **hf_config}, head_dim)


def phi3_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys with the original context, from which the factor follows."""
    rope = rope_keys(config)
    rope["rope_parameters"].pop("factor", None)
    original = {ORIGINAL_CONTEXT: config.rope_original_context} if config.rope_scaling == "longrope" else {}
    return rope | original


def granite_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, and the multipliers whose meaning is another."""
    scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
    return rope_keys(config) | {"attention_multiplier": scale, "logits_scaling": 1 / config.logit_multiplier}


def granite_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and multipliers."""
    scale: float | None = parse(hf_config, "attention_multiplier", float, 1.0)
    head_dim = HEAD_DIM.read(hf_config) or parse(hf_config, "hidden_size", int) / parse(
        hf_config, "num_attention_heads", int
    )
    if scale == 1 / math.sqrt(head_dim):
        scale = None
    divisor = parse(hf_config, "logits_scaling", float, 1.0)
    if not divisor > 0:
        raise ValueError(f"logits_scaling is {divisor}; it must be above 0")
    return rope_from_huggingface(hf_config) | {"attention_scale": scale, "logit_multiplier": 1 / divisor}


MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    keys=(*SIZES, KV_HEADS._replace(default=8), HEAD_DIM, ACTIVATION, TIED, WINDOW),
    limits={"layer_pattern": of_kinds("FS")},
    extra_keys=ministral_to_huggingface,
    extra_fields=ministral_from_huggingface,
)
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=(
        *SIZES,
        KV_HEADS._replace(default=4),
        HEAD_DIM,
        ACTIVATION,
        TIED._replace(default=True),
        ATTENTION_BIAS,
        FEEDFORWARD_BIAS,
    ),
    context=CONTEXT._replace(default=32_768),
    limits={"layer_pattern": of_kinds("FN")},
    required={"use_sliding_window": False},
    extra_keys=smollm3_to_huggingface,
    extra_fields=smollm3_from_huggingface,
    without_effect=("sliding_window",),
)
PHI3 = replace(
    MISTRAL,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys=(
        *SIZES[:-2],
        ConfigKey("rms_norm_eps", "norm_epsilon", float, 1e-5),
        SIZES[-1],
        ConfigKey("resid_pdrop", "residual_dropout", float, 0.0),
        KV_HEADS,
        HEAD_DIM,
        ACTIVATION,
        TIED,
        WINDOW._replace(default=None),
    ),
    tensors=fused(TENSORS, qkv=True, gate_up=True),
    context=CONTEXT._replace(default=4096),
    choices={**MISTRAL.choices, "rope_scaling": ("none", "longrope"), "rope_length": ANY},
    limits={"rope_dim": ANY},
    extra_keys=phi3_to_huggingface,
    extra_fields=phi3_from_huggingface,
    # A dropout that the class does not apply, and the context before a scaling that is refused.
    without_effect=("embd_pdrop", ORIGINAL_CONTEXT),
)
GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    keys=(
        *LLAMA.keys,
        ConfigKey("embedding_multiplier", "embedding_multiplier", float, 1.0),
        ConfigKey("residual_multiplier", "residual_multiplier", float, 1.0),
    ),
    choices=LLAMA.choices | {"attention_scale": ANY, "logit_multiplier": ANY},
    extra_keys=granite_to_huggingface,
    extra_fields=granite_from_huggingface,
)


def glm4_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, of a part of each head."""
    return rope_from_huggingface(hf_config, HEAD_DIM._replace(default=128).read(hf_config), part=0.5)


def glm4_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, with the part that is rotated."""
    rope = rope_keys(config)
    return rope | {PART: rope["rope_parameters"].setdefault(PART, 1.0)}


GLM4_NORMS = {
    "input_layernorm": "attention_norm",
    "post_self_attn_layernorm": "attention_output_norm",
    "post_attention_layernorm": "feedforward_norm",
    "post_mlp_layernorm": "feedforward_output_norm",
}
GLM4 = replace(
    LLAMA,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    keys=(
        *(key._replace(default=1.5625e-07) if key.field == "norm_epsilon" else key for key in SIZES),
        KV_HEADS._replace(default=2),
        HEAD_DIM._replace(default=128),
        ACTIVATION,
        TIED,
        ATTENTION_BIAS._replace(default=True),
    ),
    tensors=tuple(map(adjacent, fused(with_norms(GLM4_NORMS), gate_up=True))),
    context=CONTEXT._replace(default=131_072),
    choices=LLAMA.choices | NO_FEEDFORWARD_BIAS | {"norm_placement": ("both",), "attention_output_bias": (False,)},
    limits={"rope_dim": ANY, "attention_output_bias": ANY},
    extra_keys=glm4_to_huggingface,
    extra_fields=glm4_from_huggingface,
)
