"""Floor 4, feed-forward: the same two-layer network at every position (Vaswani et al. 2017, section 3.3).

Gated, it is one of the GLU family (Shazeer 2020, arXiv:2002.05202): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.collectives import gather_time
from model.config import ResolvedModelConfig
from model.linear import Linear
from model.memory import gradient_in_memory, result_in_memory
from model.sharding import Layout

# The bound of gpt-oss's gate, and of both sides of what it gates.
CLAMP = 7.0
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # x·Φ(x) (Hendrycks and Gimpel 2016, arXiv:1606.08415)
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),  # their approximation, as in GPT-2
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    # The gate of gpt-oss (OpenAI 2025), an approximation of gelu.
    "clamped_swiglu": lambda x: jnp.minimum(x, CLAMP) * jax.nn.sigmoid(1.702 * jnp.minimum(x, CLAMP)),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(activation: str, x: jax.Array, *up: jax.Array) -> jax.Array:
    """Returns act(x), or given `up` act(x)·up, computed in float32; the dtype stays the same.

    The backward pass computes it again from x and `up`, so that nothing else, in float32, is kept for it.
    """
    y = ACTIVATIONS[activation](x.astype(jnp.float32))
    if activation == "clamped_swiglu":
        up = tuple(jnp.clip(part.astype(jnp.float32), -CLAMP, CLAMP) + 1 for part in up)
    return math.prod((part.astype(jnp.float32) for part in up), start=y).astype(x.dtype)


activate.defvjp(
    lambda activation, *inputs: (activate(activation, *inputs), inputs),
    lambda activation, inputs, gradient: jax.vjp(partial(activate.fun, activation), *inputs)[1](gradient),
)


class FeedForward(nnx.Module):
    """down(act(up(x))) or, gated, down(act(gate(x)) · up(x)); widths D → F → D."""

    def __init__(
        self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout, linear: type[Linear] = Linear
    ):
        widen, narrow = ("model", "feedforward"), ("feedforward", "model")
        self.gate = linear("btd,df->btf", weights, "gate", widen, layout) if config.gated else None
        self.up = linear("btd,df->btf", weights, "up", widen, layout)
        self.down = linear("btf,fd->btd", weights, "down", narrow, layout, sums_over="feedforward")
        self.activation = config.activation
        self.layout = layout

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x_BTD = gather_time(x_BTD, self.layout, "feedforward")
        inputs = (self.up(x_BTD),) if self.gate is None else (self.gate(x_BTD), self.up(x_BTD))
        return self.down(result_in_memory(activate(self.activation, *map(gradient_in_memory, inputs))))
