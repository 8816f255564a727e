"""The norms of the stack, computed in float32 whatever the dtype of x."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ResolvedModelConfig


class Norm(nnx.Module):
    """RMSNorm over the last axis, x / √(mean(x²) + ε) · scale (Zhang and Sennrich 2019, arXiv:1910.07467).

    Given a bias it is LayerNorm (Ba et al. 2016, arXiv:1607.06450), which also subtracts the mean and adds the bias.
    """

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array]):
        self.scale = nnx.Param(weights["scale"])
        self.bias = nnx.Param(weights["bias"]) if "bias" in weights else None
        self.epsilon = config.norm_epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in the dtype of x."""
        x = x_BTD.astype(jnp.float32)
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (x if self.bias is None else x + self.bias[...]).astype(x_BTD.dtype)


def final_norm(config: ResolvedModelConfig, weights: Mapping[str, Any]) -> Norm | None:
    """Returns the norm after the last block, which only a pre-norm decoder has."""
    return Norm(config, weights["norm"]) if config.norm_placement == "pre" else None
