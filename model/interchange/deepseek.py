"""DeepSeek's V2 and V3 in Transformers, and Kimi K2: latent attention, two scales of YaRN, experts behind dense layers.

Rotated components stand behind the others in a head, in adjacent pairs. All layers may be dense.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ConfigKey, parse
from model.interchange.experts import (
    BALANCE,
    expert_tensors,
    has_shared_experts,
    shared_fields,
    shared_keys,
    shared_tensors,
)
from model.interchange.family import ANY, Choices, Limits
from model.interchange.rope import rope_from_huggingface, rope_keys
from model.interchange.tensors import Tensor, same_layout, torch_linear

# The scale of yarn's rotations, and the one that also scales the scores, by its square.
SCALE, SCORE_SCALE = "mscale", "mscale_all_dim"
# The norms of latents have it whatever `rms_norm_eps` is.
LATENT_EPSILON = 1e-6
ATTENTION = llama.LAYER + "self_attn."
QUERY, QUERY_LATENT = "blocks.attention.query", "blocks.attention.query_latent"


def query_tensor(name: str) -> Tensor:
    """Returns the tensor of queries."""
    return torch_linear(f"{ATTENTION}{name}.weight", QUERY)._replace(pairs=(QUERY,), rotated_last=True)


TENSORS: tuple[Tensor, ...] = (
    query_tensor("q_proj")._replace(without=QUERY_LATENT),
    torch_linear(ATTENTION + "q_a_proj.weight", QUERY_LATENT),
    same_layout(ATTENTION + "q_a_layernorm.weight", f"{QUERY_LATENT}_norm.scale"),
    query_tensor("q_b_proj")._replace(requires=QUERY_LATENT),
    torch_linear(
        ATTENTION + "kv_a_proj_with_mqa.weight", "blocks.attention.latent", "blocks.attention.rotated_key"
    )._replace(pairs=("blocks.attention.rotated_key",)),
    same_layout(ATTENTION + "kv_a_layernorm.weight", "blocks.attention.latent_norm.scale"),
    torch_linear(ATTENTION + "kv_b_proj.weight", "blocks.attention.key", "blocks.attention.value")._replace(
        by_head=True
    ),
)
OWN = {QUERY, "blocks.attention.key", "blocks.attention.value"}


def deepseek_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys with their scales, the widths of a head's parts, and that all layers are dense."""
    rope = rope_keys(replace(config, rope_dim=config.head_dim))
    if config.attention_scale is not None:
        # The root of the scores' factor is 0.1 · scale · ln(factor) + 1.
        root = math.sqrt(config.attention_scale * math.sqrt(config.head_dim))
        rope["rope_parameters"][SCORE_SCALE] = (root - 1) / (0.1 * math.log(config.rope_factor))
    widths = {"qk_nope_head_dim": config.head_dim - config.rope_dim, "num_key_value_heads": config.num_heads}
    return rope | widths | {"rope_interleave": True} | expert_keys(config)


def expert_keys(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the settings of the experts, or that all layers are dense.

    The method, the score and the frequency are read by other programs alone, and the loss by DeepSeek's.
    """
    if config.num_experts is None:
        return {"first_k_dense_replace": config.num_layers}
    method = "group_limited_greedy" if config.router_groups > 1 else "greedy"
    return shared_keys(config) | {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_dim,
        "moe_layer_freq": 1,
        "routed_scaling_factor": config.router_scale,
        "n_group": config.router_groups,
        "topk_group": config.router_groups_per_token,
        "norm_topk_prob": config.router_normalize,
        "scoring_func": config.router_score,
        "topk_method": "noaux_tc" if config.router_score == "sigmoid" else method,
        "aux_loss_alpha": config.balance_loss,
        "seq_aux": config.balance_over == "row",
    }


def expert_fields(hf_config: Mapping[str, Any], of_class: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the experts; none if all layers are dense.

    Args:
        of_class: settings of a file without them.
    """
    read = lambda name, kind: parse(hf_config, name, kind, of_class[name])
    if read("first_k_dense_replace", int) >= parse(hf_config, "num_hidden_layers", int):
        return {"balance_bias": False}
    shared, width, dense = (
        of_class[name] for name in ("n_shared_experts", "moe_intermediate_size", "first_k_dense_replace")
    )
    fields = shared_fields(hf_config, shared, width, dense) | {
        "num_experts": read("n_routed_experts", int),
        "experts_per_token": read("num_experts_per_tok", int),
        "expert_dim": read("moe_intermediate_size", int),
        "router_scale": read("routed_scaling_factor", float),
        "router_score": of_class["scoring_func"],
        "router_normalize": read("norm_topk_prob", bool) if of_class["norm_topk_prob"] else False,
        "balance_loss": parse(hf_config, "aux_loss_alpha", float, 0.001),
    }
    if fields["balance_loss"]:
        fields["balance_over"] = "row" if parse(hf_config, "seq_aux", bool, True) else "batch"
    if (method := read("topk_method", str)) not in of_class["methods"]:
        raise ValueError(f"topk_method is {method!r}; in this class it is {' or '.join(of_class['methods'])}")
    if method != "greedy":
        fields["router_groups"], fields["router_groups_per_token"] = read("n_group", int), read("topk_group", int)
    return fields


# What the classes assume of a file that does not say it, and the methods that they have.
V3_EXPERTS: dict[str, Any] = {
    **{"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
    **{"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "methods": ("noaux_tc",)},
}
V2_EXPERTS: dict[str, Any] = {
    **{"first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": None},
    **{"moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "n_group": None, "topk_group": None},
    # The class divides by no sum, whatever the file says.
    **{"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy"},
    "methods": ("greedy", "group_limited_greedy"),
}


def deepseek_from_huggingface(
    hf_config: Mapping[str, Any], of_class: Mapping[str, Any] = V3_EXPERTS, kv_heads: int | None = 128
) -> dict[str, Any]:
    """Returns rotary fields, the width of a head, and the fields of the experts.

    Args:
        of_class: settings of experts in a file without them.
        kv_heads: the key/value heads of such a file, as many as query heads if None.
    """
    heads = parse(hf_config, "num_attention_heads", int)
    if parse(hf_config, "num_key_value_heads", int, kv_heads or heads) != heads:
        raise ValueError(f"num_key_value_heads must be {heads}, the number of query heads")
    rotated = parse(hf_config, "qk_rope_head_dim", int, 64)
    if parse(hf_config, "head_dim", int, rotated) != rotated:
        raise ValueError(f"head_dim must be {rotated}, the number of rotated components")
    head_dim = parse(hf_config, "qk_nope_head_dim", int, 128) + rotated
    rope = dict(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {})
    scale, score_scale = (parse(rope, name, float, 0.0) for name in (SCALE, SCORE_SCALE))
    fields = rope_from_huggingface(
        {**hf_config, "rope_scaling": None, "rope_parameters": {**rope, SCALE: None, SCORE_SCALE: None}}
    )
    if fields.get("rope_scaling") == "yarn":
        root = lambda scale: 0.1 * scale * math.log(fields["rope_factor"]) + 1
        if scale and score_scale and rope.get("attention_factor") is None:
            fields["rope_length"] = root(scale) / root(score_scale)
        if score_scale:
            # Without the last digits, so that a scale that was written comes back.
            fields["attention_scale"] = float(f"{root(score_scale) ** 2 / math.sqrt(head_dim):.12g}")
    elif scale or score_scale:
        raise ValueError(f"rope_parameters.{SCALE if scale else SCORE_SCALE}: in this decoder it is for yarn")
    return fields | {"head_dim": head_dim, "num_kv_heads": heads} | expert_fields(hf_config, of_class)


def limits(choices: Mapping[str, tuple[Any, ...]]) -> Limits:
    """Returns the predicates that a class requires, with these choices of a model that has experts."""
    has = lambda config, name: config.num_experts is None or getattr(config, name) in choices[name]
    of_experts: Limits = {name: partial(has, name=name) for name in choices}
    return of_experts | {
        "kv_latent_dim": lambda config: config.kv_latent_dim is not None,
        "rope_dim": ANY,
        "value_dim": ANY,
        "attention_scale": lambda config: config.attention_scale is None or config.rope_scaling == "yarn",
        "shared_expert_dim": lambda config: config.num_experts is None or has_shared_experts(config),
    }


CHOICES: Choices = {
    **llama.LLAMA.choices,
    **llama.NO_FEEDFORWARD_BIAS,
    "attention_bias": (False,),
    "norm_epsilon": (LATENT_EPSILON,),
    "kv_latent_dim": ANY,
    "rope_scaling": ("none", "yarn"),
    "attention_scale": ANY,
    "rope_length": ANY,
    "num_experts": ANY,
}
EXPERT_CHOICES = {"router_bias": (False,), "shared_expert_gate": (False,)}
DEEPSEEK_V3 = replace(
    llama.LLAMA,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=(
        *llama.SIZES,
        ConfigKey("kv_lora_rank", "kv_latent_dim", int, 512),
        ConfigKey("q_lora_rank", "query_latent_dim", int | None, 1536),
        ConfigKey("qk_rope_head_dim", "rope_dim", int, 64),
        ConfigKey("v_head_dim", "value_dim", int, 128),
        llama.ACTIVATION,
        llama.TIED,
    ),
    tensors=(
        *(tensor for tensor in llama.TENSORS[:-2] if tensor.parameters[0] not in OWN),
        *TENSORS,
        *expert_tensors(),
        BALANCE,
        *shared_tensors("shared_experts"),
        *llama.TENSORS[-2:],
    ),
    context=llama.CONTEXT._replace(default=4096),
    choices=CHOICES,
    limits=limits({**EXPERT_CHOICES, "router_score": ("sigmoid",)}),
    always={"balance_bias": True},
    required={"attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1, "scoring_func": "sigmoid"},
    extra_keys=deepseek_to_huggingface,
    extra_fields=deepseek_from_huggingface,
    without_effect=("qk_head_dim", "num_nextn_predict_layers", "output_router_logits"),
    other_types=("kimi_k2",),
    quantization="fp8",
    predicted_key="num_nextn_predict_layers",
)
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    context=llama.CONTEXT,
    limits=limits(
        {**EXPERT_CHOICES, "router_score": ("softmax",), "router_normalize": (False,), "balance_bias": (False,)}
    ),
    always={},
    required={"attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1, "scoring_func": "softmax"},
    extra_fields=partial(deepseek_from_huggingface, of_class=V2_EXPERTS, kv_heads=32),
    without_effect=("qk_head_dim", "norm_topk_prob", "output_router_logits"),
    other_types=(),
    predicted_key=None,
)
