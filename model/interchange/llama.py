"""Hugging Face's Llama family: one table of names and layouts, read in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.parameters import flattened, nested, padded_vocabulary, parameter_table

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class Tensor:
    """Where one of our parameters stands in their file; theirs are [out, in], ours [in, out].

    `inputs` is how many of our leading axes (without layers) are summed over; the product of the rest is their rows.
    """

    name: str
    inputs: int = 0


TENSORS = {
    "embedding.table": Tensor("model.embed_tokens.weight"),
    "blocks.attention_norm.scale": Tensor("model.layers.{layer}.input_layernorm.weight"),
    "blocks.attention.query": Tensor("model.layers.{layer}.self_attn.q_proj.weight", 1),
    "blocks.attention.key": Tensor("model.layers.{layer}.self_attn.k_proj.weight", 1),
    "blocks.attention.value": Tensor("model.layers.{layer}.self_attn.v_proj.weight", 1),
    "blocks.attention.output": Tensor("model.layers.{layer}.self_attn.o_proj.weight", 2),
    "blocks.feedforward_norm.scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "blocks.feedforward.gate": Tensor("model.layers.{layer}.mlp.gate_proj.weight", 1),
    "blocks.feedforward.up": Tensor("model.layers.{layer}.mlp.up_proj.weight", 1),
    "blocks.feedforward.down": Tensor("model.layers.{layer}.mlp.down_proj.weight", 1),
    "norm.scale": Tensor("model.norm.weight"),
    "unembedding.matrix": Tensor("lm_head.weight", 1),
}


def to_theirs(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Nested weights → their tensors by name, without the padding of the vocabulary."""
    table = parameter_table(config)
    theirs: dict[str, np.ndarray] = {}
    for ours, stacked in flattened(weights).items():
        tensor = TENSORS[ours]
        array = np.asarray(stacked)
        for layer, one in enumerate(array if "{layer}" in tensor.name else [array]):
            if tensor.inputs:
                one = one.reshape(int(np.prod(one.shape[: tensor.inputs])), -1).T
            if "vocabulary" in table[ours].axes:
                one = one[: config.vocab_size]
            theirs[tensor.name.format(layer=layer)] = np.ascontiguousarray(one)
    return theirs


def from_theirs(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Their tensors, got by name, → nested float32 weights. ValueError names a tensor of another shape."""
    ours: dict[str, np.ndarray] = {}
    for name, parameter in parameter_table(config).items():
        tensor = TENSORS[name]
        shape = parameter.shape[1:] if "layers" in parameter.axes else parameter.shape
        layers = []
        for layer in range(config.num_layers if "{layer}" in tensor.name else 1):
            theirs = tensor.name.format(layer=layer)
            one = read(theirs).astype(np.float32)
            if "vocabulary" in parameter.axes:
                one = np.pad(one, ((0, padded_vocabulary(config) - one.shape[0]), (0, 0)))
            if tensor.inputs:
                one = one.T
            if one.size != np.prod(shape) or (one.ndim == len(shape) and one.shape != shape):
                raise ValueError(f"{theirs} has {one.size} values; the config wants the shape {shape} of {name}")
            layers.append(one.reshape(shape))
        ours[name] = np.stack(layers) if "layers" in parameter.axes else layers[0]
    return nested(ours)


def config_to_theirs(config: ModelConfig, context: int, eos_id: int) -> dict[str, Any]:
    """The values of their config.json."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.feedforward_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }


def config_from_theirs(theirs: Mapping[str, Any]) -> ModelConfig:
    """The model of their config.json. ValueError says what in it our decoder does not have."""
    if not isinstance(theirs, Mapping):
        raise ValueError("config.json holds no settings")
    if theirs.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"architectures is {theirs.get('architectures')}; only {ARCHITECTURE} can be read")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    unsupported = {
        "rope_type": rope.get("rope_type", "default") != "default",
        "hidden_act": theirs.get("hidden_act", "silu") != "silu",
        "attention_bias": theirs.get("attention_bias", False),
        "mlp_bias": theirs.get("mlp_bias", False),
    }
    if any(unsupported.values()):
        raise ValueError(
            f"{', '.join(name for name, bad in unsupported.items() if bad)}: this decoder has no such choice"
        )
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        if not isinstance(theirs.get(name), int):
            raise ValueError(f"{name} is {theirs.get(name)}; it must be a whole number")
    config = ModelConfig(
        num_layers=theirs["num_hidden_layers"],
        model_dim=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs.get("num_key_value_heads"),
        head_dim=theirs.get("head_dim"),
        feedforward_dim=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        rope_base=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10_000),
        norm_epsilon=theirs.get("rms_norm_eps", 1e-6),
        compute_dtype="float32",
    )
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config.resolved()
