"""Mixtures of experts in Transformers: Mixtral, OLMoE, Qwen's and GLM-4.5.

On disk each expert has its own matrices, whatever Transformers does with them in memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ConfigKey, parse
from model.interchange.family import ANY, Choices, Limits
from model.interchange.layer_types import (
    dense_numbers,
    of_kinds,
    pattern_fields,
    read_layer_types,
    write_layer_types,
)
from model.interchange.rope import PART, rope_from_huggingface, rope_keys
from model.interchange.tensors import Tensor, same_layout, torch_linear

ROUTER, GATE_UP, DOWN = "blocks.experts.router", "blocks.experts.gate_up", "blocks.experts.down"
SHARED = "blocks.experts.shared"
# The names of an expert's gate, up and down.
NAMES = ("gate_proj", "up_proj", "down_proj")
NUM_EXPERTS = ConfigKey("num_experts", "num_experts", int)
PER_TOKEN = ConfigKey("num_experts_per_tok", "experts_per_token", int)
WIDTH = ConfigKey("moe_intermediate_size", "expert_dim", int)
NORMALIZE = ConfigKey("norm_topk_prob", "router_normalize", bool, False)
LOSS = ConfigKey("router_aux_loss_coef", "balance_loss", float, 0.001)
# The sizes of a class without dense layers, in which `intermediate_size` is that of an expert.
ONE_WIDTH = tuple(key._replace(field="expert_dim") if key.field == "feedforward_dim" else key for key in llama.SIZES)
# What a class with experts has unless it says otherwise.
USUAL: Choices = {
    "num_experts": ANY,
    "feedforward_bias": (False,),
    "shared_expert_dim": (None,),
    "shared_expert_gate": (False,),
    "router_score": ("softmax",),
    "router_scale": (1.0,),
    "router_bias": (False,),
    "router_groups": (1,),
    "balance_bias": (False,),
}
HAS_EXPERTS: Limits = {"num_experts": lambda config: config.num_experts is not None}
NO_DENSE: Limits = {"dense_layers": lambda config: not config.dense_layers}


def has_shared_experts(config: ResolvedModelConfig) -> bool:
    """True if the shared expert is as wide as several experts."""
    return config.shared_expert_dim is not None and config.shared_expert_dim % config.expert_dim == 0


def expert_tensors(block: str = "mlp", names: tuple[str, str, str] = NAMES) -> tuple[Tensor, ...]:
    """Returns the tensors of a router, and of its experts.

    Args:
        block: the feed-forward's name in a layer.
        names: those of an expert's gate, up and down.
    """
    gate, up, down = (f"{llama.LAYER}{block}.experts.{{expert}}.{name}.weight" for name in names)
    return (
        torch_linear(f"{llama.LAYER}{block}.gate.weight", ROUTER),
        torch_linear(gate, GATE_UP)._replace(branch=0),
        torch_linear(up, GATE_UP)._replace(branch=1),
        torch_linear(down, DOWN),
    )


def shared_tensors(name: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the expert that computes every token."""
    parts = zip(NAMES, ("gate", "up", "down"), strict=True)
    return tuple(torch_linear(f"{llama.LAYER}mlp.{name}.{part}.weight", f"{SHARED}.{ours}") for part, ours in parts)


def with_experts(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns Llama's tensors, with these in its layers, too."""
    return (*llama.TENSORS[:-2], *tensors, *llama.TENSORS[-2:])


# The bias that balances the load is float32 in all files, as Transformers computes with it.
BALANCE = same_layout(f"{llama.LAYER}mlp.gate.e_score_correction_bias", "blocks.experts.balance")._replace(float32=True)

MIXTRAL = replace(
    llama.MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *(key._replace(default=1e-5) if key.field == "norm_epsilon" else key for key in ONE_WIDTH),
        llama.KV_HEADS._replace(default=8),
        llama.HEAD_DIM,
        llama.ACTIVATION,
        llama.TIED,
        llama.WINDOW._replace(default=None),
        NUM_EXPERTS._replace(key="num_local_experts", default=8),
        PER_TOKEN._replace(default=2),
        LOSS,
    ),
    tensors=with_experts(*expert_tensors("block_sparse_moe", ("w1", "w3", "w2"))),
    choices=llama.MISTRAL.choices | USUAL | {"router_normalize": (True,)},
    limits=HAS_EXPERTS | NO_DENSE,
    extra_fields=lambda hf_config: rope_from_huggingface(with_base(hf_config, 1e6)),
    one_width=True,
    # Noise of training alone.
    without_effect=("output_router_logits", "router_jitter_noise"),
)
OLMOE = replace(
    llama.LLAMA,
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=(
        *(key._replace(default=1e-5) if key.field == "norm_epsilon" else key for key in ONE_WIDTH),
        llama.KV_HEADS,
        llama.ACTIVATION,
        llama.TIED,
        llama.ATTENTION_BIAS,
        NUM_EXPERTS._replace(default=64),
        PER_TOKEN._replace(default=8),
        NORMALIZE,
        LOSS._replace(default=0.01),
    ),
    tensors=with_experts(*expert_tensors()),
    context=llama.CONTEXT._replace(default=4096),
    choices=llama.LLAMA.choices | USUAL | {"qk_norm": (True,), "qk_norm_over": ("all_heads",)},
    limits=HAS_EXPERTS | NO_DENSE | {"head_dim": lambda config: config.head_dim * config.num_heads == config.model_dim},
    required={"clip_qkv": None, "sliding_window": None},
    one_width=True,
    without_effect=("output_router_logits",),
)


def with_base(hf_config: Mapping[str, Any], base: float) -> dict[str, Any]:
    """Returns the config with a base of the rotary frequencies if it has none at the top."""
    return {**hf_config, "rope_theta": parse(hf_config, "rope_theta", float, base)}


def dense_keys(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the numbers of the dense layers."""
    return {"mlp_only_layers": dense_numbers(config), "decoder_sparse_step": 1}


def read_dense_layers(hf_config: Mapping[str, Any], letters: str) -> tuple[str, int]:
    """Returns (letters, first dense layers): small letters if the dense layers are not the first ones.

    ValueError if `mlp_only_layers` is no list of numbers.
    """
    step, only = parse(hf_config, "decoder_sparse_step", int, 1), hf_config.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(number) is not int for number in only):
        raise ValueError(f"mlp_only_layers is {only!r}; it must be a list of the numbers of layers")
    if step < 1:
        raise ValueError(f"decoder_sparse_step is {step}; it must be at least 1")
    dense = [number in only or (number + 1) % step > 0 for number in range(len(letters))]
    first = dense.index(False) if False in dense else len(dense)
    if not any(dense[first:]):
        return letters, first
    return "".join(letter.lower() if is_dense else letter for letter, is_dense in zip(letters, dense, strict=True)), 0


def qwen3_moe_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, the window of all layers, and the dense layers."""
    window = {"sliding_window": config.sliding_window, "use_sliding_window": config.sliding_window is not None}
    return rope_keys(config) | window | dense_keys(config)


def qwen3_moe_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, the window of all layers, and the dense layers."""
    layers = parse(hf_config, "num_hidden_layers", int)
    window = llama.WINDOW.read(hf_config) if parse(hf_config, "use_sliding_window", bool, False) else None
    letters, first = read_dense_layers(hf_config, ("F" if window is None else "S") * layers)
    return rope_from_huggingface(hf_config) | pattern_fields(letters, window) | {"dense_layers": first}


def qwen2_moe_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, the type of each layer, the window, and the dense layers."""
    types = {"layer_types": write_layer_types(config), "max_window_layers": config.num_layers}
    return qwen3_moe_to_huggingface(config) | types


def qwen2_moe_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern: without `layer_types`, every second of the first layers has a window."""
    layers, first = parse(hf_config, "num_hidden_layers", int), parse(hf_config, "max_window_layers", int, 28)
    window = llama.WINDOW.read(hf_config) if parse(hf_config, "use_sliding_window", bool, False) else None
    default = "F" * layers if window is None else "".join("FS"[i % 2 == 0 and i < first] for i in range(layers))
    letters, dense = read_dense_layers(hf_config, read_layer_types(hf_config, layers, default))
    return rope_from_huggingface(hf_config) | pattern_fields(letters, window) | {"dense_layers": dense}


QWEN3_MOE = replace(
    llama.QWEN3,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=4),
        llama.HEAD_DIM,
        llama.ACTIVATION,
        llama.TIED,
        llama.ATTENTION_BIAS,
        # Transformers 5 writes the other name; published files and other programs have this one.
        NUM_EXPERTS._replace(default=128, other_key="num_local_experts"),
        PER_TOKEN._replace(default=8),
        WIDTH._replace(default=768),
        NORMALIZE,
        LOSS,
    ),
    tensors=with_experts(*expert_tensors()),
    choices=llama.CHOICES | USUAL | {"qk_norm": (True,)},
    limits=HAS_EXPERTS | {"layer_pattern": lambda config: of_kinds("F")(config) or of_kinds("S")(config)},
    extra_keys=qwen3_moe_to_huggingface,
    extra_fields=qwen3_moe_from_huggingface,
    without_effect=("output_router_logits",),
)
QWEN2_MOE = replace(
    llama.QWEN2,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=16),
        llama.HEAD_DIM,
        llama.ACTIVATION,
        llama.TIED,
        llama.ATTENTION_BIAS._replace(key="qkv_bias", default=True),
        NUM_EXPERTS._replace(default=60),
        PER_TOKEN._replace(default=4),
        WIDTH._replace(default=1408),
        ConfigKey("shared_expert_intermediate_size", "shared_expert_dim", int, 5632),
        NORMALIZE,
        LOSS,
    ),
    tensors=with_experts(
        *expert_tensors(),
        *shared_tensors("shared_expert"),
        same_layout(f"{llama.LAYER}mlp.shared_expert_gate.weight", "blocks.experts.shared_gate")._replace(one_row=True),
    ),
    choices=llama.CHOICES
    | USUAL
    | {"shared_expert_dim": ANY, "shared_expert_gate": (True,), "attention_output_bias": (False,)},
    limits=HAS_EXPERTS
    | llama.QWEN2.limits
    | {"shared_expert_dim": lambda config: config.shared_expert_dim is not None},
    extra_keys=qwen2_moe_to_huggingface,
    extra_fields=qwen2_moe_from_huggingface,
    without_effect=("output_router_logits",),
)


def shared_keys(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the number of experts that the shared one is made of, and the first dense layers."""
    assert config.shared_expert_dim
    shared = config.shared_expert_dim // config.expert_dim
    return {"n_shared_experts": shared, "first_k_dense_replace": config.dense_layers}


def shared_fields(hf_config: Mapping[str, Any], shared: int, width: int, dense: int) -> dict[str, Any]:
    """Returns the width of the shared expert, and the first dense layers; the arguments are those of a file without.

    ValueError if there is no shared expert.
    """
    shared = parse(hf_config, "n_shared_experts", int, shared)
    if shared < 1:
        raise ValueError(f"n_shared_experts is {shared}; in this class it is at least 1")
    return {
        "shared_expert_dim": shared * parse(hf_config, WIDTH.key, int, width),
        "dense_layers": parse(hf_config, "first_k_dense_replace", int, dense),
    }


def glm4_moe_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys with the part that is rotated, the shared expert, and the dense layers."""
    rope = rope_keys(config)
    return rope | {PART: rope["rope_parameters"].setdefault(PART, 1.0)} | shared_keys(config)


def glm4_moe_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields, of a part of each head, the shared expert, and the dense layers."""
    heads = parse(hf_config, "num_attention_heads", int)
    head_dim = llama.HEAD_DIM.read(hf_config) or parse(hf_config, "hidden_size", int) // max(heads, 1)
    rope = rope_from_huggingface(hf_config, head_dim, part=0.5)
    return rope | shared_fields(hf_config, shared=1, width=1408, dense=1)


# A router whose experts are chosen by a sigmoid's score and a bias, in the best groups.
GROUPED_KEYS = (
    ConfigKey("routed_scaling_factor", "router_scale", float, 1.0),
    ConfigKey("n_group", "router_groups", int, 1),
    ConfigKey("topk_group", "router_groups_per_token", int, 1),
)
GLM4_MOE = replace(
    llama.LLAMA,
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=(
        *(key._replace(default=1e-5) if key.field == "norm_epsilon" else key for key in llama.SIZES),
        llama.KV_HEADS._replace(default=8),
        llama.HEAD_DIM,
        llama.ACTIVATION,
        llama.TIED,
        llama.ATTENTION_BIAS,
        ConfigKey("use_qk_norm", "qk_norm", bool, False),
        NUM_EXPERTS._replace(key="n_routed_experts", default=128),
        PER_TOKEN._replace(default=8),
        WIDTH._replace(default=1408),
        NORMALIZE._replace(default=True),
        *GROUPED_KEYS,
    ),
    tensors=with_experts(*expert_tensors(), BALANCE, *shared_tensors("shared_experts")),
    context=llama.CONTEXT._replace(default=131_072),
    choices=llama.LLAMA.choices
    | USUAL
    | {
        "qk_norm": ANY,
        "attention_output_bias": (False,),
        "router_score": ("sigmoid",),
        "router_scale": ANY,
        "router_groups": ANY,
        "shared_expert_dim": ANY,
        "balance_bias": ANY,
    },
    limits=HAS_EXPERTS | {"rope_dim": ANY, "attention_output_bias": ANY, "shared_expert_dim": has_shared_experts},
    always={"balance_bias": True},
    extra_keys=glm4_moe_to_huggingface,
    extra_fields=glm4_moe_from_huggingface,
    without_effect=("output_router_logits", "num_nextn_predict_layers"),
    predicted_key="num_nextn_predict_layers",
)
