"""Rotary classes of Transformers with LayerNorm: GPT-NeoX (Pythia), StableLM, StarCoder 2 and Cohere 2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ConfigKey, parse
from model.interchange.family import ANY, Family
from model.interchange.layer_types import (
    FULL,
    WINDOW,
    layer_type_keys,
    of_kinds,
    pattern_fields,
    read_layer_types,
)
from model.interchange.rope import PART, rope_from_huggingface, rope_keys
from model.interchange.tensors import Tensor, same_layout, torch_linear

NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feedforward_norm"}
SIZES = tuple(key for key in llama.SIZES if key.field != "norm_epsilon")
EPSILON = ConfigKey("layer_norm_eps", "norm_epsilon", float, 1e-5)
COHERE_LETTERS = {FULL: "N", WINDOW: "S"}


def _head_dim(hf_config: Mapping[str, Any]) -> int:
    return parse(hf_config, "hidden_size", int) // max(parse(hf_config, "num_attention_heads", int), 1)


def heads_divide_width(config: ResolvedModelConfig) -> bool:
    """True if heads are as wide as in a class without `head_dim`."""
    return config.head_dim * config.num_heads == config.model_dim


def neox_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, also by their older names, and the order of the branches."""
    rope = rope_keys(config)
    older = {"rotary_emb_base": config.rope_base, "rotary_pct": rope["rope_parameters"].setdefault(PART, 1.0)}
    return rope | older | {"use_parallel_residual": config.block == "parallel"}


def neox_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the order of the branches."""
    base = parse(hf_config, "rotary_emb_base", float, 10_000.0)
    part = parse(hf_config, "rotary_pct", float, 0.25)
    rope = rope_from_huggingface({"rope_theta": base, **hf_config}, _head_dim(hf_config), part)
    parallel = parse(hf_config, "use_parallel_residual", bool, True)
    return rope | {"block": "parallel" if parallel else "sequential"}


def stablelm_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys and the order of the branches."""
    rope = rope_keys(config)
    part = rope["rope_parameters"].setdefault(PART, 1.0)
    return rope | {PART: part, "use_parallel_residual": config.block != "sequential"}


def stablelm_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the order of the branches."""
    parallel = parse(hf_config, "use_parallel_residual", bool, False)
    rope = rope_from_huggingface(hf_config, _head_dim(hf_config), part=0.25)
    return rope | {"block": "parallel_one_norm" if parallel else "sequential"}


def starcoder2_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the biases of the feed-forward, which are there with those of attention."""
    return rope_from_huggingface(hf_config) | {"feedforward_bias": parse(hf_config, "use_bias", bool, True)}


def cohere2_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys and the type of each layer."""
    return rope_keys(config) | layer_type_keys(config, COHERE_LETTERS)


def cohere2_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern; without `layer_types` every fourth layer is full, without positions."""
    layers, window = parse(hf_config, "num_hidden_layers", int), llama.WINDOW.read(hf_config)
    period = parse(hf_config, "sliding_window_pattern", int, 4)
    if period < 1:
        raise ValueError(f"sliding_window_pattern is {period}; it must be at least 1")
    default = "".join("SN"[(i + 1) % period == 0] for i in range(layers))
    letters = read_layer_types(hf_config, layers, default, COHERE_LETTERS)
    return rope_from_huggingface(hf_config) | pattern_fields(letters, window)


def neox_tensors() -> tuple[Tensor, ...]:
    """Returns the tensors of GPT-NeoX, whose queries, keys and values are in one matrix, head by head."""
    layer = "gpt_neox.layers.{layer}."
    heads = tuple(f"blocks.attention.{name}" for name in ("query", "key", "value"))
    norms = {layer + name: f"blocks.{ours}" for name, ours in NORMS.items()} | {"gpt_neox.final_layer_norm": "norm"}
    *layer_norms, last_norm = [
        (same_layout(f"{name}.weight", f"{ours}.scale"), same_layout(f"{name}.bias", f"{ours}.bias"))
        for name, ours in norms.items()
    ]
    matrices = {
        "attention.dense": "blocks.attention.output",
        "mlp.dense_h_to_4h": "blocks.feedforward.up",
        "mlp.dense_4h_to_h": "blocks.feedforward.down",
    }
    return (
        same_layout("gpt_neox.embed_in.weight", "embedding.table"),
        *(tensor for both in layer_norms for tensor in both),
        Tensor(layer + "attention.query_key_value.weight", heads, transposed=True, by_head=True),
        Tensor(layer + "attention.query_key_value.bias", tuple(f"{name}_bias" for name in heads), by_head=True),
        *(torch_linear(f"{layer}{name}.weight", parameter) for name, parameter in matrices.items()),
        *(same_layout(f"{layer}{name}.bias", f"{parameter}_bias") for name, parameter in matrices.items()),
        *last_norm,
        torch_linear("embed_out.weight", "unembedding.matrix"),
    )


CHOICES = llama.CHOICES | {"norm": ("layernorm",)}
GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    keys=(
        *SIZES,
        EPSILON,
        llama.ACTIVATION._replace(default="gelu"),
        llama.TIED,
        llama.ATTENTION_BIAS._replace(default=True),
    ),
    tensors=neox_tensors(),
    context=llama.CONTEXT,
    choices=CHOICES
    | {"gated": (False,), "sliding_window": (None,), "block": ("sequential", "parallel"), "norm_bias": ANY},
    limits={
        "num_kv_heads": lambda config: config.num_kv_heads == config.num_heads,
        "head_dim": heads_divide_width,
        "rope_dim": ANY,
    },
    always={"feedforward_bias": True, "norm_bias": True},
    extra_keys=neox_to_huggingface,
    extra_fields=neox_from_huggingface,
    # Older files hold masks with the weights.
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    # Dropouts in places of their own, and a name for what it is anyway.
    without_effect=("hidden_dropout", "classifier_dropout", "is_decoder"),
)
STABLELM = replace(
    llama.LLAMA,
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    keys=(
        *SIZES,
        EPSILON,
        llama.KV_HEADS._replace(default=32),
        llama.ACTIVATION,
        llama.TIED,
        ConfigKey("use_qkv_bias", "attention_bias", bool, False),
    ),
    tensors=llama.with_norms(NORMS, bias=True),
    context=llama.CONTEXT._replace(default=4096),
    choices=CHOICES
    | llama.NO_FEEDFORWARD_BIAS
    | {
        "sliding_window": (None,),
        "attention_output_bias": (False,),
        "block": ("sequential", "parallel_one_norm"),
        "norm_bias": ANY,
    },
    limits={"head_dim": heads_divide_width, "rope_dim": ANY, "attention_output_bias": ANY},
    always={"norm_bias": True},
    required={"qk_layernorm": False},
    extra_keys=stablelm_to_huggingface,
    extra_fields=stablelm_from_huggingface,
    without_effect=("hidden_dropout",),
)
STARCODER2 = replace(
    llama.LLAMA,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    keys=(
        *SIZES,
        ConfigKey("norm_epsilon", "norm_epsilon", float, 1e-5),
        ConfigKey("residual_dropout", "residual_dropout", float, 0.0),
        ConfigKey("embedding_dropout", "embedding_dropout", float, 0.0),
        llama.KV_HEADS._replace(default=2),
        llama.HEAD_DIM,
        llama.ACTIVATION._replace(default="gelu_pytorch_tanh"),
        llama.TIED._replace(default=True),
        llama.WINDOW._replace(default=None),
        ConfigKey("use_bias", "attention_bias", bool, True),
    ),
    tensors=tuple(
        tensor._replace(name=tensor.name.replace("up_proj", "c_fc").replace("down_proj", "c_proj"))
        for tensor in llama.with_norms(NORMS, bias=True)
    ),
    context=llama.CONTEXT._replace(default=4096),
    choices=CHOICES | {"gated": (False,), "norm_bias": ANY},
    limits={"feedforward_bias": lambda config: config.feedforward_bias == config.attention_bias},
    always={"norm_bias": True},
    extra_fields=starcoder2_from_huggingface,
)
COHERE2 = replace(
    llama.LLAMA,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    keys=(
        *SIZES,
        EPSILON,
        llama.KV_HEADS,
        llama.HEAD_DIM,
        llama.ACTIVATION,
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
        ConfigKey("logit_scale", "logit_multiplier", float, 0.0625),
    ),
    tensors=tuple(llama.adjacent(tensor) for tensor in llama.with_norms({"input_layernorm": "attention_norm"})),
    context=llama.CONTEXT._replace(default=8192),
    choices=CHOICES | llama.NO_FEEDFORWARD_BIAS | {"block": ("parallel_one_norm",), "norm_bias": (False,)},
    limits={"layer_pattern": of_kinds("SN")},
    extra_keys=cohere2_to_huggingface,
    extra_fields=cohere2_from_huggingface,
)
