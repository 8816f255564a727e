"""Hugging Face's Llama and its relatives, Mistral and Qwen3: one table of names and layouts, read both ways."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import HIGH_TURNS, ModelConfig
from model.parameters import flattened, nested, padded_vocabulary, parameter_table

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What all of them have; a model with another value is none of them.
COMMON = {
    "position": "rope",
    "norm": "rmsnorm",
    "norm_placement": "pre",
    "gated": True,
    "scale_embeddings": False,
    "attention_softcap": None,
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@dataclass(frozen=True)
class Tensor:
    """Where one of our parameters stands in their file; theirs are [out, in], ours [in, out].

    `inputs` is how many of our leading axes (without layers) are summed over; the product of the rest is their rows.
    `flat`: a bias of heads, which they keep as one axis.
    """

    name: str
    inputs: int = 0
    flat: bool = False


TENSORS = {
    "embedding.table": Tensor("model.embed_tokens.weight"),
    "blocks.attention_norm.scale": Tensor("model.layers.{layer}.input_layernorm.weight"),
    "blocks.attention.query": Tensor("model.layers.{layer}.self_attn.q_proj.weight", 1),
    "blocks.attention.key": Tensor("model.layers.{layer}.self_attn.k_proj.weight", 1),
    "blocks.attention.value": Tensor("model.layers.{layer}.self_attn.v_proj.weight", 1),
    "blocks.attention.output": Tensor("model.layers.{layer}.self_attn.o_proj.weight", 2),
    "blocks.attention.query_bias": Tensor("model.layers.{layer}.self_attn.q_proj.bias", flat=True),
    "blocks.attention.key_bias": Tensor("model.layers.{layer}.self_attn.k_proj.bias", flat=True),
    "blocks.attention.value_bias": Tensor("model.layers.{layer}.self_attn.v_proj.bias", flat=True),
    "blocks.attention.output_bias": Tensor("model.layers.{layer}.self_attn.o_proj.bias"),
    "blocks.attention.query_norm.scale": Tensor("model.layers.{layer}.self_attn.q_norm.weight"),
    "blocks.attention.key_norm.scale": Tensor("model.layers.{layer}.self_attn.k_norm.weight"),
    "blocks.feedforward_norm.scale": Tensor("model.layers.{layer}.post_attention_layernorm.weight"),
    "blocks.feedforward.gate": Tensor("model.layers.{layer}.mlp.gate_proj.weight", 1),
    "blocks.feedforward.up": Tensor("model.layers.{layer}.mlp.up_proj.weight", 1),
    "blocks.feedforward.down": Tensor("model.layers.{layer}.mlp.down_proj.weight", 1),
    "blocks.feedforward.gate_bias": Tensor("model.layers.{layer}.mlp.gate_proj.bias"),
    "blocks.feedforward.up_bias": Tensor("model.layers.{layer}.mlp.up_proj.bias"),
    "blocks.feedforward.down_bias": Tensor("model.layers.{layer}.mlp.down_proj.bias"),
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
            if tensor.flat:
                one = one.reshape(-1)
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


def family(config: ModelConfig) -> str:
    """The model_type of theirs that has this model's choices. ValueError names those that none has."""
    kind = "qwen3" if config.qk_norm else "mistral" if config.sliding_window else "llama"
    biases = {"mistral": ("attention_bias", "feedforward_bias"), "qwen3": ("feedforward_bias",), "llama": ()}[kind]
    wanted = COMMON | dict.fromkeys(biases, False)
    found = [f"model.{name} = {getattr(config, name)}" for name in wanted if getattr(config, name) != wanted[name]]
    if found:
        raise ValueError(f"{ARCHITECTURES[kind]} in Transformers has no {', no '.join(found)}")
    return kind


def config_to_theirs(config: ModelConfig, context: int, eos_id: int) -> dict[str, Any]:
    """The values of their config.json. ValueError as of `family`."""
    kind = family(config)
    theirs = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
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
        "rope_parameters": rope_to_theirs(config),
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }
    if kind == "llama":
        theirs["mlp_bias"] = config.feedforward_bias
    else:
        theirs["sliding_window"] = config.sliding_window
    if kind == "qwen3":
        theirs |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    return theirs


def rope_to_theirs(config: ModelConfig) -> dict[str, Any]:
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
        theirs["original_max_position_embeddings"] = config.rope_original_context
    return theirs


# Their names of `rope_low_turns` and `rope_high_turns`.
TURNS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


def rope_from_theirs(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our rotary fields from their config. ValueError names what our scalings do not have."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; it must be a table of settings")
    ours: dict[str, Any] = {"rope_base": number(rope, "rope_theta", number(theirs, "rope_theta", 10_000.0))}
    # Older files call it "type".
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", *TURNS):
        raise ValueError(f"rope_type is {kind}; this decoder has default, linear, llama3 and yarn")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", *TURNS.get(kind, ())}
    if others := [name for name in rope if name not in known and rope[name] is not None]:
        raise ValueError(f"rope_parameters.{others[0]}: this decoder has no such choice")
    if kind == "default":
        return ours
    ours |= {"rope_scaling": kind, "rope_factor": number(rope, "factor")}
    if kind in TURNS:
        low, high = TURNS[kind]
        ours["rope_original_context"] = whole_number(rope, "original_max_position_embeddings")
        ours["rope_low_turns"] = number(rope, low, 1.0)
        ours["rope_high_turns"] = number(rope, high, HIGH_TURNS[kind])
    return ours


def number(theirs: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A setting that is a number; `default` where it is missing or null. ValueError where it is none."""
    found = theirs.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < sys.float_info.max:
        raise ValueError(f"{name} is {found!r}; it must be a number")
    return float(found)


def whole_number(theirs: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A setting that is a whole number, as of `number`."""
    if (found := number(theirs, name, default)) != int(found):
        raise ValueError(f"{name} is {found!r}; it must be a whole number")
    return int(found)


def config_from_theirs(theirs: Mapping[str, Any]) -> ModelConfig:
    """The model of their config.json. ValueError says what in it our decoder does not have."""
    if not isinstance(theirs, Mapping):
        raise ValueError("config.json holds no settings")
    named = theirs.get("architectures")
    kind = next((kind for kind, name in ARCHITECTURES.items() if named == [name]), None)
    if kind is None:
        raise ValueError(f"architectures is {named}; what can be read is {', '.join(ARCHITECTURES.values())}")
    activations = {name: ours for ours, name in ACTIVATIONS.items()}
    activation = theirs.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in activations:
        raise ValueError(f"hidden_act is {activation!r}; this decoder has {', '.join(activations)}")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(theirs.get(name, False), bool):
            raise ValueError(f"{name} is {theirs[name]!r}; it must be true or false")
    optional = lambda name: None if theirs.get(name) is None else whole_number(theirs, name)
    windowed = kind == "mistral" or (kind == "qwen3" and theirs.get("use_sliding_window", False))
    if kind == "qwen3" and windowed and theirs.get("max_window_layers") != 0:
        raise ValueError("max_window_layers: in this decoder all layers have the sliding window, or none")
    config = ModelConfig(
        num_layers=whole_number(theirs, "num_hidden_layers"),
        model_dim=whole_number(theirs, "hidden_size"),
        num_heads=whole_number(theirs, "num_attention_heads"),
        num_kv_heads=optional("num_key_value_heads"),
        head_dim=optional("head_dim"),
        feedforward_dim=whole_number(theirs, "intermediate_size"),
        vocab_size=whole_number(theirs, "vocab_size"),
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        attention_bias=theirs.get("attention_bias", False),
        attention_dropout=number(theirs, "attention_dropout", 0.0),
        qk_norm=kind == "qwen3",
        sliding_window=optional("sliding_window") if windowed else None,
        activation=activations[activation],
        feedforward_bias=theirs.get("mlp_bias", False),
        norm_epsilon=number(theirs, "rms_norm_eps", 1e-6),
        compute_dtype="float32",
        **rope_from_theirs(theirs),
    )
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config.resolved()
