"""Google's first Gemma in Transformers: a Llama whose embeddings are scaled by √D and whose norms multiply by 1 + w.

A norm's w is ours less one, which loses the last bits of values below 0.5: less than 1e-7 of each.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange import llama
from model.interchange.family import Family
from model.interchange.settings import ALSO

# In its files "gelu" means the approximation, too, so the exact one has no name.
ACTIVATIONS = {name: theirs for name, theirs in llama.ACTIVATIONS.items() if name != "gelu"}
ACTIVATION = llama.ACTIVATION._replace(
    default=ACTIVATIONS["gelu_tanh"], names=ACTIVATIONS, also={**ALSO, "gelu": "gelu_tanh"}
)
# Where some versions of Transformers look for it.
OLDER = ACTIVATION._replace(theirs="hidden_activation")


def to_theirs(config: ResolvedModelConfig) -> dict[str, Any]:
    """The activation under both names, and no token that pads: by default it is the first."""
    return llama.rotary(config) | {OLDER.theirs: OLDER.written(config.activation), "pad_token_id": None}


def from_theirs(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """ValueError where the activation has two names that are not the same."""
    if theirs.get(OLDER.theirs) is not None and OLDER.read(theirs) != ACTIVATION.read(theirs):
        raise ValueError(f"{ACTIVATION.theirs} and {OLDER.theirs} are not the same; leave out the one that is wrong")
    return llama.rope_from_theirs(theirs)


GEMMA = Family(
    kind="gemma",
    architecture="GemmaForCausalLM",
    first="model.",
    settings=(
        *llama.SIZES,
        llama.KV_HEADS._replace(default=16),
        llama.HEAD._replace(default=256),
        ACTIVATION,
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
    ),
    tensors=tuple(
        tensor._replace(added=1.0) if tensor.name.endswith("norm.weight") else tensor for tensor in llama.TENSORS
    ),
    context=llama.CONTEXT._replace(default=8192),
    choices=llama.CHOICES | llama.NO_FEEDFORWARD_BIAS | llama.NO_WINDOW | {"scale_embeddings": (True,)},
    fixed={"use_bidirectional_attention": False},
    more_to=to_theirs,
    more_from=from_theirs,
    without=llama.INVERSE_FREQUENCIES,
)
