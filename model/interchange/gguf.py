"""Models in the names and layouts of GGUF, as tables over the tensors of Hugging Face Transformers.

llama.cpp reads the settings that it knows of an architecture and computes the rest as that architecture does, without
a warning. A model is therefore written only if the architecture has every one of its choices.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from model.config import ResolvedModelConfig
from model.interchange.experts import DOWN, GATE_UP, ROUTER, SHARED
from model.interchange.gguf_architectures import ARCHITECTURES, USUAL, WINDOW, YARN_TURNS
from model.interchange.huggingface import Interchange
from model.interchange.llama import adjacent
from model.interchange.tensors import ParameterReader, Tensor, TensorMap
from model.parameters import Parameter, parameter_table
from model.position import frequencies

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
    "blocks.attention.query_latent": "attn_q_a",
    "blocks.attention.query_latent_norm": "attn_q_a_norm",
    "blocks.attention.latent": "attn_kv_a",
    "blocks.attention.latent_norm": "attn_kv_a_norm",
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
FUSED_NAMES = {"attn_q": "attn_qkv", "ffn_gate": "ffn_up", "attn_kv_a": "attn_kv_a_mqa"}
# Keys and values that are made of a latent, in one tensor of Transformers.
OF_LATENT = ("blocks.attention.key", "blocks.attention.value")
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
        if model.config.reward_head:
            raise ValueError("llama.cpp predicts tokens, and a model with model.reward_head does not; take --format=hf")
        model_type = model.family.model_type
        if model_type not in ARCHITECTURES:
            raise ValueError(f"llama.cpp has no model.norm_placement = {model.config.norm_placement} here")
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
        if tensor.parameters == OF_LATENT:
            # Queries are multiplied with the weights of keys, and sums of latents with those of values.
            return [
                Tensor(f"blk.{{layer}}.{name}.weight", (parameter,), transposed, heads_apart=True)
                for name, parameter, transposed in zip(("attn_k_b", "attn_v_b"), OF_LATENT, (False, True), strict=True)
            ]
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
        # Queries that are made of a latent.
        name = f"{name}_b" if tensor.requires else name
        name = f"{name}.{'bias' if first.endswith(('bias', 'balance')) else 'weight'}"
        parameter = parameters[first]
        named = Tensor(
            f"blk.{{layer}}.{name}" if "layers" in parameter.axes else name,
            tensor.parameters,
            transposed=bool(parameter.fan_in),
            pairs=tensor.pairs,
            rotated_last=tensor.rotated_last,
            requires=tensor.requires,
            without=tensor.without,
        )
        return [adjacent(named) if self.architecture.interleaved else named]


def rope_divisors(config: ResolvedModelConfig) -> np.ndarray:
    """Returns the factor by which scaling slows each rotary pair, float32 [C/2]."""
    plain = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / frequencies(config)).astype(np.float32)
