"""llama.cpp's architectures: what each computes, and the settings that it reads."""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from model.config import ResolvedModelConfig
from model.interchange.family import ANY, Choices
from model.interchange.layer_types import dense_numbers, letters_of
from model.interchange.layernorm import heads_divide_width
from model.position import rotated_length

# Values that an architecture computes unless it says otherwise.
USUAL: Choices = {"activation": ("silu",), "rope_scaling": ("none", "linear", "yarn"), "rope_length": (None,)}
WITH_LLAMA3: Choices = {"rope_scaling": ("none", "linear", "yarn", "llama3")}
# llama.cpp does not read these from a file.
YARN_TURNS: Choices = {"rope_high_turns": (32.0,), "rope_low_turns": (1.0,), "rope_truncate": (True,)}


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    Attributes:
        choices: values that it computes, by field, besides `USUAL`; other fields follow from the Transformers class.
        limits: predicates of a config that it requires, by field.
        keys: functions from a config to its own settings, by key; None is not written.
        names: names of modules that differ from `NAMES`.
        interleaved: true if components that are rotated together are adjacent.
        own_output: true if it has no tied embeddings; the table of a tied model is written twice.
    """

    name: str
    choices: Choices
    limits: Mapping[str, Callable[[ResolvedModelConfig], bool]] = {}
    keys: Mapping[str, Callable[[ResolvedModelConfig], Any]] = {}
    names: Mapping[str, str] = {}
    interleaved: bool = False
    own_output: bool = False


def window_pattern(config: ResolvedModelConfig) -> int | list[bool] | None:
    """Returns p if layers p, 2p, … are full and all others have the window; else true for each layer with a window."""
    if config.sliding_window is None:
        return None
    windows = [letter == "S" for letter in letters_of(config)]
    periods = range(1, len(windows) + 2)
    return next((p for p in periods if windows == [(i + 1) % p > 0 for i in range(len(windows))]), windows)


def scaled_for_head(layers_of_27b: int) -> Callable[[ResolvedModelConfig], bool]:
    """Returns a predicate of a Gemma: q·k is divided by √head_dim, or in the model of 27B by √(D/H)."""

    def holds(config: ResolvedModelConfig) -> bool:
        is_27b = config.num_layers == layers_of_27b
        divisor = config.model_dim // config.num_heads if is_27b else config.head_dim
        return math.isclose(config.attention_scale or config.head_dim**-0.5, divisor**-0.5)

    return holds


def unscaled_in_windows(config: ResolvedModelConfig) -> bool:
    """True if no layer with a window scales its rotations."""
    return config.sliding_window is None or config.rope_scaling == "none" or not config.window_rope_scaling


def has_groups(config: ResolvedModelConfig) -> bool:
    """True if some groups of experts are closed to a token."""
    return config.router_groups_per_token < config.router_groups


def is_lite(config: ResolvedModelConfig) -> bool:
    """True for the sizes in which deepseek2 takes queries to have no latent, whatever a file says."""
    return config.num_layers in (26, 27) or (config.num_layers, config.vocab_size) == (48, 128_256)


def log_multiplier(config: ResolvedModelConfig) -> float | None:
    """Returns the m with which deepseek2 has our scale of scores; None without yarn.

    With rotated vectors of length f it multiplies q·k by (f + f·m·ln(rope_factor))² / √head_dim. An m of 0 would give
    them another length, so it is never exactly 0.
    """
    if config.rope_scaling != "yarn":
        return None
    root = math.sqrt((config.attention_scale or config.head_dim**-0.5) * math.sqrt(config.head_dim))
    return (root / rotated_length(config) - 1) / math.log(config.rope_factor) or 1e-9


WINDOW = "attention.sliding_window"
WINDOW_KEYS: dict[str, Callable[[ResolvedModelConfig], Any]] = {
    WINDOW: attrgetter("sliding_window"),
    f"{WINDOW}_pattern": window_pattern,
}
TIED: Choices = {"tie_embeddings": (True,)}
NO_BIAS: Choices = {"attention_bias": (False,)}
GELU: Choices = {"activation": ("gelu_tanh",)}
# All heads together are as wide as the model.
HEADS = {"head_dim": heads_divide_width}
# The first layers are dense, and a shared expert is made of several.
EXPERT_KEYS: dict[str, Callable[[ResolvedModelConfig], Any]] = {
    "expert_gating_func": lambda config: 2 if config.router_score == "sigmoid" else 1,
    "expert_weights_scale": attrgetter("router_scale"),
    "expert_weights_norm": attrgetter("router_normalize"),
    "expert_shared_count": lambda config: (config.shared_expert_dim or 0) // (config.expert_dim or 1),
    "leading_dense_block_count": lambda config: len(dense_numbers(config)),
}
# Every layer has experts.
NO_DENSE = {"dense_layers": lambda config: not dense_numbers(config)}

DEEPSEEK2 = Architecture(
    "deepseek2",
    {"rope_length": ANY},
    limits={
        "query_latent_dim": lambda config: config.query_latent_dim is None or not is_lite(config),
        "rope_factor": lambda config: config.rope_scaling != "yarn" or config.rope_factor > 1,
        # It finds the best groups as DeepSeek-V3 does, by their two best experts.
        "router_groups": lambda config: config.router_score == "sigmoid" or not has_groups(config),
    },
    keys={
        **EXPERT_KEYS,
        "expert_feed_forward_length": lambda config: config.expert_dim or config.feedforward_dim,
        "expert_group_count": lambda config: config.router_groups if has_groups(config) else None,
        "expert_group_used_count": lambda config: config.router_groups_per_token if has_groups(config) else None,
        "attention.q_lora_rank": lambda config: config.query_latent_dim or 0,
        "attention.kv_lora_rank": attrgetter("kv_latent_dim"),
        # The cache holds the latent and the rotated key, which all heads share.
        "attention.head_count_kv": lambda config: 1,
        "attention.key_length": lambda config: (config.kv_latent_dim or 0) + config.rope_dim,
        "attention.value_length": attrgetter("kv_latent_dim"),
        "attention.key_length_mla": attrgetter("head_dim"),
        "attention.value_length_mla": attrgetter("value_dim"),
        "rope.scaling.yarn_log_multiplier": log_multiplier,
        "rope.scaling.attn_factor": rotated_length,
    },
)
LLAMA = Architecture("llama", WITH_LLAMA3, interleaved=True)
OLMO2 = Architecture(
    "olmo2",
    NO_BIAS | {"window_rope_base": (None,)},
    limits=HEADS | {"window_rope_scaling": unscaled_in_windows},
    keys=WINDOW_KEYS,
    names={"blocks.attention_norm": "post_attention_norm", "blocks.feedforward_norm": "post_ffw_norm"},
    own_output=True,
)
# Architectures by the model_type of Transformers.
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": Architecture("qwen2", {}, limits=HEADS),
    "qwen3": Architecture("qwen3", NO_BIAS),
    "smollm3": Architecture(
        "smollm3",
        NO_BIAS | {"feedforward_bias": (False,)},
        limits={
            "layer_pattern": lambda config: letters_of(config) == ("FFFN" * config.num_layers)[: config.num_layers]
        },
        interleaved=True,
    ),
    "phi3": Architecture("phi3", {}, limits=HEADS),
    "granite": Architecture(
        "granite",
        WITH_LLAMA3,
        keys={
            "attention.scale": attrgetter("attention_scale"),
            "embedding_scale": attrgetter("embedding_multiplier"),
            "residual_scale": attrgetter("residual_multiplier"),
            "logit_scale": lambda config: 1 / config.logit_multiplier,
        },
        interleaved=True,
    ),
    "glm4": Architecture("glm4", {}, interleaved=True),
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "gemma": Architecture("gemma", GELU | TIED | NO_BIAS),
    "gemma2": Architecture(
        "gemma2",
        GELU | TIED | NO_BIAS,
        limits={
            "attention_scale": scaled_for_head(46),
            "attention_softcap": lambda config: config.attention_softcap is not None,
            "logit_softcap": lambda config: config.logit_softcap is not None,
            "sliding_window": lambda config: config.sliding_window is not None,
        },
        keys={
            **WINDOW_KEYS,
            "attn_logit_softcapping": attrgetter("attention_softcap"),
            "final_logit_softcapping": attrgetter("logit_softcap"),
        },
    ),
    "gemma3_text": Architecture(
        "gemma3",
        GELU | NO_BIAS,
        limits={"attention_scale": scaled_for_head(62), "window_rope_scaling": unscaled_in_windows},
        keys={
            **WINDOW_KEYS,
            "final_logit_softcapping": attrgetter("logit_softcap"),
            "rope.freq_base_swa": lambda config: config.window_rope_base or config.rope_base,
        },
    ),
    "gpt2": Architecture("gpt2", GELU),
    "gpt_neox": Architecture(
        "gptneox",
        GELU | {"attention_bias": (True,)},
        keys={"use_parallel_residual": lambda config: config.block == "parallel"},
        own_output=True,
    ),
    "stablelm": Architecture("stablelm", {}, own_output=True),
    "starcoder2": Architecture("starcoder2", GELU | {"attention_bias": (True,)}, limits=HEADS),
    "cohere2": Architecture(
        "cohere2",
        TIED | NO_BIAS,
        limits={"sliding_window": lambda config: config.sliding_window is not None},
        keys={**WINDOW_KEYS, "logit_scale": attrgetter("logit_multiplier")},
        interleaved=True,
    ),
    "mixtral": LLAMA,
    "olmoe": Architecture(
        "olmoe",
        NO_BIAS | {"router_normalize": (False,)},
        # It takes the norm of keys to be as wide as that of queries.
        limits={"num_kv_heads": lambda config: config.num_kv_heads == config.num_heads},
        own_output=True,
    ),
    "qwen3_moe": Architecture("qwen3moe", NO_BIAS | {"router_normalize": (True,)}, limits=NO_DENSE, own_output=True),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {"attention_bias": (True,), "router_normalize": (False,)},
        limits=HEADS | NO_DENSE,
        keys={"expert_shared_feed_forward_length": attrgetter("shared_expert_dim")},
        own_output=True,
    ),
    "glm4_moe": Architecture(
        "glm4moe",
        {"router_groups": (1,)},
        keys=EXPERT_KEYS,
        names={"blocks.feedforward_norm": "post_attention_norm"},
        own_output=True,
    ),
    "deepseek_v2": DEEPSEEK2,
    "deepseek_v3": DEEPSEEK2,
    "gpt_oss": Architecture(
        "gpt-oss",
        {"activation": ("clamped_swiglu",), "attention_bias": (True,)},
        limits={"layer_pattern": lambda config: letters_of(config) == ("SF" * config.num_layers)[: config.num_layers]},
        keys=WINDOW_KEYS,
        names={"blocks.feedforward_norm": "post_attention_norm"},
        own_output=True,
    ),
}
