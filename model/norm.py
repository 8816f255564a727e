"""The two norms of the stack, computed in float32 whatever the dtype of x."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ResolvedModelConfig


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) · scale over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array]):
        self.scale = nnx.Param(weights["scale"])
        self.epsilon = config.norm_epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in the dtype of x."""
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / √(variance(x) + ε) · scale + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array]):
        self.scale = nnx.Param(weights["scale"])
        self.bias = nnx.Param(weights["bias"])
        self.epsilon = config.norm_epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in the dtype of x."""
        x = x_BTD.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...] + self.bias[...]).astype(x_BTD.dtype)


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def final_norm(config: ResolvedModelConfig, weights: Mapping[str, Any]) -> RMSNorm | LayerNorm | None:
    """Returns the norm after the last block, which only a pre-norm decoder has."""
    return NORMS[config.norm](config, weights["norm"]) if config.norm_placement == "pre" else None
