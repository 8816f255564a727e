"""Models in the names and layouts of GGUF, as tables over the tensors of Hugging Face Transformers.

llama.cpp reads the settings that it knows of an architecture and computes the rest as that architecture does, without
a warning. A model is therefore written only if the architecture has every one of its choices.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.interchange.experts import DOWN, GATE_UP, ROUTER, SHARED
from model.interchange.family import Choices
from model.interchange.huggingface import Interchange
from model.interchange.layer_types import dense_numbers, letters_of
from model.interchange.layernorm import heads_divide_width
from model.interchange.llama import adjacent
from model.interchange.tensors import ParameterReader, Tensor, TensorMap
from model.parameters import Parameter, parameter_table
from model.position import frequencies

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
# Scores are sigmoids (2), the first layers are dense, and a shared expert is made of several.
SIGMOID_KEYS: dict[str, Callable[[ResolvedModelConfig], Any]] = {
    "expert_gating_func": lambda config: 2,
    "expert_weights_scale": attrgetter("router_scale"),
    "expert_weights_norm": attrgetter("router_normalize"),
    "expert_shared_count": lambda config: (config.shared_expert_dim or 0) // config.expert_dim,
    "leading_dense_block_count": attrgetter("dense_layers"),
}
# Every layer has experts.
NO_DENSE = {"dense_layers": lambda config: not dense_numbers(config)}

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
        keys=SIGMOID_KEYS,
        names={"blocks.feedforward_norm": "post_attention_norm"},
        own_output=True,
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        {"activation": ("clamped_swiglu",), "attention_bias": (True,)},
        limits={"layer_pattern": lambda config: letters_of(config) == ("SF" * config.num_layers)[: config.num_layers]},
        keys=WINDOW_KEYS,
        names={"blocks.feedforward_norm": "post_attention_norm"},
        own_output=True,
    ),
}

# GGUF names by those of our parameters, without their last part.
NAMES = {
    "embedding": "token_embd",
    "position": "position_embd",
    "norm": "output_norm",
    "unembedding": "output",
    "blocks.attention_norm": "attn_norm",
    "blocks.attention.query": "attn_q",
    "blocks.attention.key": "attn_k",
    "blocks.attention.value": "attn_v",
    "blocks.attention.query_norm": "attn_q_norm",
    "blocks.attention.key_norm": "attn_k_norm",
    "blocks.attention.output": "attn_output",
    "blocks.attention_output_norm": "post_attention_norm",
    "blocks.feedforward_norm": "ffn_norm",
    "blocks.feedforward.gate": "ffn_gate",
    "blocks.feedforward.up": "ffn_up",
    "blocks.feedforward.down": "ffn_down",
    "blocks.feedforward_output_norm": "post_ffw_norm",
    "blocks.attention.sink": "attn_sinks",
    ROUTER: "ffn_gate_inp",
    DOWN: "ffn_down_exps",
    "blocks.experts.balance": "exp_probs_b",
    f"{SHARED}.gate": "ffn_gate_shexp",
    f"{SHARED}.up": "ffn_up_shexp",
    f"{SHARED}.down": "ffn_down_shexp",
    f"{SHARED}_gate": "ffn_gate_inp_shexp",
}
# The names of experts' gate and up, which we store together.
BRANCHES = ("ffn_gate_exps", "ffn_up_exps")
# Names of one tensor with the parameters of several, by that of the first.
FUSED_NAMES = {"attn_q": "attn_qkv", "ffn_gate": "ffn_up"}
LAST_PART = re.compile(r"\.(table|matrix|scale)$|[._](bias)$")
ROPE_FREQUENCIES = "rope_freqs.weight"
# Ends of the names of tensors that are always float32, as vectors are.
FLOAT32_TENSORS = ("position_embd.weight", "ffn_gate_inp.weight", ".bias", ROPE_FREQUENCIES)


class GGUFExport:
    """A model as an `architecture` of llama.cpp, in names and layouts that follow from those in Transformers.

    Raises:
        ValueError: no architecture has all of the model's choices; the message names those that are missing.
    """

    def __init__(self, model: Interchange):
        self.model = model
        model_type = model.family.model_type
        if model_type not in ARCHITECTURES:
            name = "norm_placement" if model.config.kv_latent_dim is None else "kv_latent_dim"
            raise ValueError(f"llama.cpp has no model.{name} = {getattr(model.config, name)} here")
        self.architecture = ARCHITECTURES[model_type]
        self.config = config = replace(
            model.widened, tie_embeddings=model.widened.tie_embeddings and not self.architecture.own_output
        )
        if missing := self._missing():
            settings = ", no ".join(f"model.{name} = {getattr(config, name)}" for name in missing)
            raise ValueError(f"llama.cpp's {self.architecture.name} has no {settings}")
        parameters = parameter_table(config)
        tensors = (tensor for tensor in model.family.tensors if tensor.parameters[0] in parameters)
        named = [named for tensor in tensors for named in self._tensors(tensor, parameters)]
        self._tensor_map = TensorMap(config, tuple(named))
        self._has_rope_divisors = config.rope_scaling == "llama3"

    def metadata(self) -> dict[str, Any]:
        """Returns the settings of the architecture, by the names after its own."""
        config = self.config
        settings: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "context_length": self.model.num_positions,
            "embedding_length": config.model_dim,
            "block_count": config.num_layers,
            "feed_forward_length": config.feedforward_dim,
            "attention.head_count": config.num_heads,
            "attention.head_count_kv": config.num_kv_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            f"attention.layer_norm_{'rms_' if config.norm == 'rmsnorm' else ''}epsilon": config.norm_epsilon,
        }
        if config.num_experts:
            settings |= {"expert_count": config.num_experts, "expert_used_count": config.experts_per_token}
            settings["expert_feed_forward_length"] = config.expert_dim
        own = {key: value(config) for key, value in self.architecture.keys.items()}
        settings |= {key: value for key, value in own.items() if value is not None}
        if config.position != "rope":
            return settings
        settings |= {"rope.dimension_count": config.rope_dim, "rope.freq_base": config.rope_base}
        if config.rope_scaling in ("linear", "yarn"):
            settings |= {"rope.scaling.type": config.rope_scaling, "rope.scaling.factor": config.rope_factor}
        if config.rope_scaling == "yarn":
            settings["rope.scaling.original_context_length"] = config.rope_original_context
        return settings

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor, in the order of `tensors`."""
        shapes = {array.name: self._tensor_map.shape(array.tensor) for array in self._tensor_map.arrays()}
        return shapes | ({ROPE_FREQUENCIES: (self.config.head_dim // 2,)} if self._has_rope_divisors else {})

    def tensors(self, read: ParameterReader) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, float32 array) for each tensor: [outputs, inputs], a vector or a table."""
        widened = functools.lru_cache(maxsize=1)(self.model.export_reader(read))
        for array in self._tensor_map.arrays():
            values = self._tensor_map.write(array, widened).astype(np.float32, copy=False)
            # Where Transformers computes with 1 + w, llama.cpp computes with w.
            is_norm = self._tensor_map.parameters[array.tensor.parameters[0]].role == "norm"
            yield array.name, values + np.float32(1) if is_norm and self.config.norm_offset else values
        if self._has_rope_divisors:
            yield ROPE_FREQUENCIES, rope_divisors(self.config)

    def _missing(self) -> list[str]:
        """Returns the fields whose values the architecture does not have."""
        config, architecture = self.config, self.architecture
        choices = USUAL | architecture.choices | (YARN_TURNS if config.rope_scaling == "yarn" else {})
        missing = [name for name, values in choices.items() if values and getattr(config, name) not in values]
        missing += [name for name, holds in architecture.limits.items() if not holds(config)]
        # A window as long as the context hides nothing.
        hides = config.sliding_window is not None and config.sliding_window < self.model.context
        return [*missing, "sliding_window"] if hides and WINDOW not in architecture.keys else missing

    def _tensors(self, tensor: Tensor, parameters: Mapping[str, Parameter]) -> list[Tensor]:
        """Returns the GGUF tensors with the parameters of one in Transformers; all experts of a layer are in one."""
        first = tensor.parameters[0]
        if first.startswith(GATE_UP):
            end, transposed = ("bias", False) if first.endswith("bias") else ("weight", True)
            names = BRANCHES if tensor.branch in (0, None) else ()
            return [
                Tensor(f"blk.{{layer}}.{name}.{end}", (first,), transposed, branch=branch)
                for branch, name in enumerate(names)
            ]
        module = LAST_PART.sub("", first)
        name = self.architecture.names.get(module, NAMES[module])
        name = FUSED_NAMES[name] if tensor.parameters[1:] else name
        name = f"{name}.{'bias' if first.endswith(('bias', 'balance')) else 'weight'}"
        parameter = parameters[first]
        named = Tensor(
            f"blk.{{layer}}.{name}" if "layers" in parameter.axes else name,
            tensor.parameters,
            transposed=bool(parameter.fan_in),
        )
        return [adjacent(named) if self.architecture.interleaved else named]


def rope_divisors(config: ResolvedModelConfig) -> np.ndarray:
    """Returns the factor by which scaling slows each rotary pair, float32 [C/2]."""
    plain = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / frequencies(config)).astype(np.float32)
