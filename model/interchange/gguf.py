"""Models in the names and layouts of GGUF, as tables over the tensors of Hugging Face Transformers.

llama.cpp reads the settings that it knows of an architecture and computes the rest as that architecture does, without
a warning. A model is therefore written only if the architecture has every one of its choices.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.interchange.huggingface import Interchange
from model.interchange.tensors import ParameterReader
from model.position import frequencies

NO_BIAS_NO_LLAMA3 = {"attention_bias": (False,), "rope_scaling": ("none", "linear", "yarn")}


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    Attributes:
        choices: values that it computes, by field; other fields follow from the Transformers class.
        interleaved: true if components that are rotated together are adjacent.
        norm_offset: number that is added to norm weights on export: where Transformers computes with 1 + w, llama.cpp
            computes with w.
    """

    name: str
    choices: Mapping[str, tuple[Any, ...]]
    interleaved: bool = False
    norm_offset: float = 0.0


LLAMA = Architecture("llama", {"activation": ("silu",)}, interleaved=True)
# Architectures by the model_type of Transformers.
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": Architecture("qwen3", {"activation": ("silu",)} | NO_BIAS_NO_LLAMA3),
    "gemma": Architecture(
        "gemma", {"activation": ("gelu_tanh",), "tie_embeddings": (True,)} | NO_BIAS_NO_LLAMA3, norm_offset=1.0
    ),
    "gpt2": Architecture("gpt2", {"activation": ("gelu_tanh",)}),
}

# GGUF names by those of Transformers: modules outside the layers, and modules of each layer.
GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")
# GPT-2's matrices, which Transformers stores as [inputs, outputs].
TRANSPOSED = re.compile(r"transformer\.h\.\d+\..*\.c_\w+\.weight")
ROPE_FREQUENCIES = "rope_freqs.weight"
# These tensors are always float32, as vectors are.
FLOAT32_TENSORS = ("position_embd.weight", ROPE_FREQUENCIES)


class GGUFExport:
    """A model as an `architecture` of llama.cpp, in names and layouts that follow from those in Transformers.

    Raises:
        ValueError: no architecture has all of the model's choices; the message names those that are missing.
    """

    def __init__(self, model: Interchange):
        self.model = model
        self.config = config = model.config
        model_type = model.family.model_type
        if model_type not in ARCHITECTURES:
            raise ValueError(f"llama.cpp has no model.norm_placement = {config.norm_placement}")
        self.architecture = ARCHITECTURES[model_type]
        self._has_rope_divisors = config.rope_scaling == "llama3"
        choices = {**self.architecture.choices}
        if config.rope_scaling == "yarn":
            # llama.cpp does not read these from a file.
            choices |= {"rope_high_turns": (32.0,), "rope_low_turns": (1.0,)}
        missing = [name for name, values in choices.items() if getattr(config, name) not in values]
        # A window as long as the context hides nothing.
        if config.sliding_window and config.sliding_window < model.context:
            missing.append("sliding_window")
        if missing:
            settings = ", no ".join(f"model.{name} = {getattr(config, name)}" for name in missing)
            raise ValueError(f"llama.cpp's {self.architecture.name} has no {settings}")

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
        if config.position != "rope":
            return settings
        settings |= {"rope.dimension_count": config.head_dim, "rope.freq_base": config.rope_base}
        if config.rope_scaling in ("linear", "yarn"):
            settings |= {"rope.scaling.type": config.rope_scaling, "rope.scaling.factor": config.rope_factor}
        if config.rope_scaling == "yarn":
            settings["rope.scaling.original_context_length"] = config.rope_original_context
        return settings

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor, in the order of `tensors`."""
        shapes = {
            gguf_name(name): shape[::-1] if TRANSPOSED.fullmatch(name) else shape
            for name, shape in self.model.shapes.items()
        }
        return shapes | ({ROPE_FREQUENCIES: (self.config.head_dim // 2,)} if self._has_rope_divisors else {})

    def tensors(self, read: ParameterReader) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, float32 array) for each tensor: [outputs, inputs], a vector or a table."""
        for name, array in self.model.export_tensors(read):
            array = array.astype(np.float32, copy=False)
            if TRANSPOSED.fullmatch(name):
                array = array.T
            if self.architecture.interleaved and ".q_proj." in name:
                array = interleave_pairs(array, self.config.num_heads)
            if self.architecture.interleaved and ".k_proj." in name:
                array = interleave_pairs(array, self.config.num_kv_heads)
            if self.architecture.norm_offset and name.endswith("norm.weight"):
                array = array + np.float32(self.architecture.norm_offset)
            yield gguf_name(name), np.ascontiguousarray(array)
        if self._has_rope_divisors:
            yield ROPE_FREQUENCIES, rope_divisors(self.config)


def gguf_name(hf_name: str) -> str:
    """Returns the GGUF name of a tensor of Transformers."""
    module, _, part = hf_name.rpartition(".")
    if layer := LAYER.fullmatch(module):
        return f"blk.{layer[1]}.{BLOCK_NAMES[layer[2]]}.{part}"
    return f"{GLOBAL_NAMES[module]}.{part}"


def interleave_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows [H · C, ...] with pairs (i, i + C/2) into adjacent pairs (2i, 2i + 1)."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def rope_divisors(config: ResolvedModelConfig) -> np.ndarray:
    """Returns the factor by which scaling slows each rotary pair, float32 [C/2]."""
    plain = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / frequencies(config)).astype(np.float32)
