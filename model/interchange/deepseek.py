"""DeepSeek's V2 and V3 in Transformers as far as their layers are dense: latent attention, two scales of YaRN.

Rotated components stand behind the others in a head, in adjacent pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ConfigKey, parse
from model.interchange.family import ANY, Choices
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
    return rope | widths | {"first_k_dense_replace": config.num_layers, "rope_interleave": True}


def deepseek_from_huggingface(
    hf_config: Mapping[str, Any], dense: int = 3, kv_heads: int | None = 128
) -> dict[str, Any]:
    """Returns rotary fields and the width of a head. ValueError if a layer mixes experts.

    Args:
        dense: the dense layers of a file that says none.
        kv_heads: the key/value heads of such a file, as many as query heads if None.
    """
    heads, layers = parse(hf_config, "num_attention_heads", int), parse(hf_config, "num_hidden_layers", int)
    dense = parse(hf_config, "first_k_dense_replace", int, dense)
    if dense < layers:
        raise ValueError(f"first_k_dense_replace is {dense}; in this decoder all {layers} layers are dense")
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
    return fields | {"head_dim": head_dim, "num_kv_heads": heads}


CHOICES: Choices = {
    **llama.LLAMA.choices,
    **llama.NO_FEEDFORWARD_BIAS,
    "attention_bias": (False,),
    "norm_epsilon": (LATENT_EPSILON,),
    "kv_latent_dim": ANY,
    "rope_scaling": ("none", "yarn"),
    "attention_scale": ANY,
    "rope_length": ANY,
}
# Settings of layers with experts, of which there are none.
EXPERTS = (
    *("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor"),
    *("n_group", "topk_group", "norm_topk_prob", "output_router_logits"),
)
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
        *llama.TENSORS[-2:],
    ),
    context=llama.CONTEXT._replace(default=4096),
    choices=CHOICES,
    limits={
        "kv_latent_dim": lambda config: config.kv_latent_dim is not None,
        "rope_dim": ANY,
        "value_dim": ANY,
        "attention_scale": lambda config: config.attention_scale is None or config.rope_scaling == "yarn",
    },
    required={"attention_bias": False, "rope_interleave": True},
    extra_keys=deepseek_to_huggingface,
    extra_fields=deepseek_from_huggingface,
    without_effect=(*EXPERTS, "qk_head_dim", "num_nextn_predict_layers"),
)
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    context=llama.CONTEXT,
    required={"attention_bias": False, "mlp_bias": False},
    extra_fields=partial(deepseek_from_huggingface, dense=0, kv_heads=32),
    without_effect=(*EXPERTS, "qk_head_dim", "topk_method"),
)
