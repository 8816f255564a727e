"""The norms of the stack, computed in float32 whatever the dtype of x."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ResolvedModelConfig


class Norm(nnx.Module):
    """RMSNorm over the last axis, x / √(mean(x²) + ε) · scale (Zhang and Sennrich 2019, arXiv:1910.07467).

    LayerNorm (Ba et al. 2016, arXiv:1607.06450) also subtracts the mean, and may add a bias.

    Args:
        centered: subtract the mean.
        axes: the axes of x that are normed; the weights have these.
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        weights: Mapping[str, jax.Array],
        centered: bool = False,
        axes: tuple[int, ...] = (-1,),
    ):
        self.scale = nnx.Param(weights["scale"])
        self.bias = nnx.Param(weights["bias"]) if "bias" in weights else None
        self.offset = float(config.norm_offset)
        self.epsilon = config.norm_epsilon
        self.centered = centered
        self.axes = axes

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D], in the dtype of x."""
        x = x_BTD.astype(jnp.float32)
        if self.centered:
            x = x - jnp.mean(x, axis=self.axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=self.axes, keepdims=True) + self.epsilon) * self._scale(x.ndim)
        return (x if self.bias is None else x + self.bias[...]).astype(x_BTD.dtype)

    def _scale(self, ndim: int) -> jax.Array:
        """Returns the factors, with an axis of size 1 between those of the weights where x has others."""
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        if len(self.axes) == 1:
            return scale
        return jnp.expand_dims(scale, [axis for axis in range(min(self.axes), 0) if axis not in self.axes])


def stack_norm(config: ResolvedModelConfig, weights: Mapping[str, jax.Array]) -> Norm:
    """Returns a norm of residuals or of a branch's output, as `model.norm` says."""
    return Norm(config, weights, centered=config.norm == "layernorm")


def final_norm(config: ResolvedModelConfig, weights: Mapping[str, Any]) -> Norm | None:
    """Returns the norm after the last block, which a post-norm decoder has not."""
    return None if config.norm_placement == "post" else stack_norm(config, weights["norm"])
