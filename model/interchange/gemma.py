"""Google's first Gemma in Transformers: a Llama whose embeddings are scaled by √D and whose norms multiply by 1 + w.

A norm's w is ours less one, which loses the last bits of values below 0.5: less than 1e-7 of each.
"""

from model.interchange import llama
from model.interchange.family import Family

# In its files "gelu" means the approximation, too, so the exact one has no name.
ACTIVATIONS = {name: theirs for name, theirs in llama.ACTIVATIONS.items() if name != "gelu"}
GEMMA = Family(
    kind="gemma",
    architecture="GemmaForCausalLM",
    first="model.",
    settings=(
        *llama.SIZES,
        llama.HEAD._replace(default=256),
        llama.ACTIVATION._replace(default=ACTIVATIONS["gelu_tanh"], names=ACTIVATIONS),
        llama.TIED._replace(default=True),
        llama.ATTENTION_BIAS,
    ),
    tensors=tuple(
        tensor._replace(added=1.0) if tensor.name.endswith("norm.weight") else tensor for tensor in llama.TENSORS
    ),
    context=llama.CONTEXT._replace(default=8192),
    choices=llama.CHOICES | llama.NO_FEEDFORWARD_BIAS | llama.NO_WINDOW | {"scale_embeddings": (True,)},
    fixed={"use_bidirectional_attention": False},
    more_to=llama.rotary,
    more_from=llama.rope_from_theirs,
    without=llama.INVERSE_FREQUENCIES,
)
