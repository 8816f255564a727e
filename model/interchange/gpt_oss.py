"""OpenAI's gpt-oss in Transformers: experts with biases, attention with sinks, and a window in every second layer.

The experts of a layer are stored together, with the columns of gate and up in turn.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import parse
from model.interchange.experts import (
    DOWN,
    GATE_UP,
    HAS_EXPERTS,
    LOSS,
    NO_DENSE,
    NUM_EXPERTS,
    ONE_WIDTH,
    PER_TOKEN,
    ROUTER,
    USUAL,
    with_base,
    with_experts,
)
from model.interchange.family import ANY
from model.interchange.layer_types import (
    has_capitals,
    layer_type_keys,
    of_kinds,
    pattern_fields,
    read_layer_types,
)
from model.interchange.rope import ORIGINAL_CONTEXT, TRUNCATE, rope_from_huggingface, rope_keys
from model.interchange.tensors import same_layout, torch_linear

MLP = llama.LAYER + "mlp."
TENSORS = with_experts(
    same_layout(f"{llama.LAYER}self_attn.sinks", "blocks.attention.sink"),
    torch_linear(f"{MLP}router.weight", ROUTER),
    same_layout(f"{MLP}router.bias", "blocks.experts.router_bias"),
    same_layout(f"{MLP}experts.gate_up_proj", GATE_UP)._replace(interleaved=True),
    same_layout(f"{MLP}experts.gate_up_proj_bias", f"{GATE_UP}_bias")._replace(interleaved=True),
    same_layout(f"{MLP}experts.down_proj", DOWN),
    same_layout(f"{MLP}experts.down_proj_bias", f"{DOWN}_bias"),
)
# The rotary settings of a file that has none.
ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
ROPE |= {TRUNCATE: False, ORIGINAL_CONTEXT: 4096}


def gpt_oss_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns rotary keys, the type of each layer, and the constants of the activation."""
    constants = {"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    return rope_keys(config) | layer_type_keys(config) | constants


def gpt_oss_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields and the pattern; without `layer_types` every second layer has a window."""
    layers = parse(hf_config, "num_hidden_layers", int)
    window = llama.WINDOW._replace(default=128).read(hf_config)
    letters = read_layer_types(hf_config, layers, ("SF" * layers)[:layers])
    rope = {} if hf_config.get("rope_scaling") or hf_config.get("rope_parameters") else {"rope_parameters": ROPE}
    return rope_from_huggingface(with_base(hf_config, 150_000.0) | rope) | pattern_fields(letters, window)


GPT_OSS = replace(
    llama.LLAMA,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=(
        *(key._replace(default=1e-5) if key.field == "norm_epsilon" else key for key in ONE_WIDTH),
        llama.KV_HEADS._replace(default=8),
        llama.HEAD_DIM._replace(default=64),
        llama.TIED,
        llama.ATTENTION_BIAS._replace(default=True),
        NUM_EXPERTS._replace(key="num_local_experts", default=128),
        PER_TOKEN._replace(default=4),
        LOSS,
    ),
    tensors=TENSORS,
    context=llama.CONTEXT._replace(default=131_072),
    choices={name: values for name, values in llama.LLAMA.choices.items() if name != "sliding_window"}
    | USUAL
    | {
        "activation": ("clamped_swiglu",),
        "attention_sinks": (True,),
        "router_score": ("softmax_of_chosen",),
        "feedforward_bias": ANY,
        "router_bias": ANY,
    },
    limits=HAS_EXPERTS | NO_DENSE | {"layer_pattern": lambda config: has_capitals(config) and of_kinds("FS")(config)},
    always={"feedforward_bias": True, "router_bias": True},
    required={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    extra_keys=gpt_oss_to_huggingface,
    extra_fields=gpt_oss_from_huggingface,
    one_width=True,
    quantization="mxfp4",
    # The activation has no other name.
    without_effect=("hidden_act", "output_router_logits"),
)
