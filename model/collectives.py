"""Reshards of the decoder: FSDP's gathering of weights, and the gathering and scattering of positions.

Each states a sharding and leaves the collective to XLA. Without rules every one is the identity.
"""

import jax
from jax.sharding import PartitionSpec

from model.sharding import Layout, as_tuple


def gather_weight(weight: jax.Array, layout: Layout, *axes: str | None) -> jax.Array:
    """Returns a stored weight for use: "model" and "latent" are gathered, the other axes stay sharded.

    One mesh axis is gathered at a time, the innermost first, so that the backward pass reduce-scatters the gradient
    over each axis, and all-reduces over copies of the weight (`data`, slices) only a shard.
    """
    if not layout.rules:
        return weight
    parts = [as_tuple(layout.rules.get(axis)) if axis else () for axis in axes]
    used = [() if axis in ("model", "latent") else part for axis, part in zip(axes, parts, strict=True)]
    while True:
        reduced = layout.token_axes - {mesh for part in parts for mesh in part}
        weight = jax.reshard(weight, PartitionSpec(*parts, reduced=reduced))
        if parts == used:
            return weight
        parts = [part[:-1] if part != kept else kept for part, kept in zip(parts, used, strict=True)]


def gather_time(x_BTD: jax.Array, layout: Layout, over: str) -> jax.Array:
    """Gathers residuals [B, T, D] for products whose weights are sharded on the logical axis `over`.

    This is the all-gather of sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198); the backward pass
    reduce-scatters the gradient.
    """
    if not layout.rules:
        return x_BTD
    return jax.reshard(x_BTD, layout.spec("batch", "time", None, reduced=layout.mesh_axes(over)))


def partial_sums(layout: Layout, over: str) -> PartitionSpec | None:
    """Returns the sharding of a [B, T, D] product that is still to be summed over the shards of the axis `over`."""
    return layout.out_sharding("batch", "time", None, unreduced=layout.mesh_axes(over))


def scatter_time(sums_BTD: jax.Array, layout: Layout) -> jax.Array:
    """Sums `partial_sums` and scatters them over the positions of the residual stream."""
    return layout.reshard(sums_BTD, "batch", "sequence", None)


def gather_keys(k_BKTC: jax.Array, layout: Layout) -> jax.Array:
    """Gathers keys or values of all positions, for the queries of each device."""
    if not layout.mesh_axes("time"):
        return k_BKTC
    return jax.reshard(k_BKTC, layout.spec("batch", "kv_heads", None, None, reduced=layout.mesh_axes("time")))
