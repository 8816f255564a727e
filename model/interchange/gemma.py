"""Google's first Gemma in Transformers: a Llama with embeddings scaled by √D and norms that multiply by 1 + w.

Its w is our scale minus one, which loses the last bits of values below 0.5: less than 1e-7 of each.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.config_keys import ALIASES

# In its files "gelu" also means the approximation, so the exact activation has no name.
ACTIVATIONS = {name: hf_name for name, hf_name in llama.ACTIVATIONS.items() if name != "gelu"}
ACTIVATION = llama.ACTIVATION._replace(
    default=ACTIVATIONS["gelu_tanh"], values=ACTIVATIONS, aliases={**ALIASES, "gelu": "gelu_tanh"}
)
# The key that some versions of Transformers read.
OLDER_KEY = ACTIVATION._replace(key="hidden_activation")


def gemma_to_huggingface(config: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the activation under both names, and no padding token, which would otherwise be the first token."""
    return llama.rope_keys(config) | {OLDER_KEY.key: OLDER_KEY.write(config.activation), "pad_token_id": None}


def gemma_from_huggingface(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary fields. ValueError if the activation has two different names."""
    if hf_config.get(OLDER_KEY.key) is not None and OLDER_KEY.read(hf_config) != ACTIVATION.read(hf_config):
        raise ValueError(f"{ACTIVATION.key} and {OLDER_KEY.key} are not the same; leave out the one that is wrong")
    return llama.rope_from_huggingface(hf_config)


GEMMA = replace(
    llama.LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=16),
        llama.HEAD_DIM._replace(default=256),
        ACTIVATION,
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
    ),
    tensors=tuple(
        tensor._replace(offset=1.0) if tensor.name.endswith("norm.weight") else tensor for tensor in llama.TENSORS
    ),
    context=llama.CONTEXT._replace(default=8192),
    choices={**llama.LLAMA.choices, **llama.NO_FEEDFORWARD_BIAS, "scale_embeddings": (True,)},
    limits={},
    required={"use_bidirectional_attention": False},
    extra_keys=gemma_to_huggingface,
    extra_fields=gemma_from_huggingface,
)
