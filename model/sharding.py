"""Logical axis names, and one table of rules that maps them to the axes of the ambient mesh.

The decoder names the meaning of each axis; which devices hold which part is data, passed in as a `Layout`. Mesh axes
are Explicit: a sharding is part of an array's type, so a wrong one is an error while tracing. In such a type `reduced`
means "the gradient of this array is summed over these mesh axes later" and `unreduced` "this array still has to be
summed over them": together they place each gradient's one reduction where it is scattered into shards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """A table from logical axes to mesh axes.

    Activations have "batch"; "sequence" on the residual stream and "time" inside the floors; and "heads", "kv_heads",
    "feedforward" or "vocabulary". Weights have these and "model" or "latent", by which they are only stored: it is
    gathered before use (FSDP). Weights of experts have "experts" and, for their model width, "expert_model". "lookup"
    shares the model width D, besides "model", while embedding rows are looked up.

    Attributes:
        rules: logical axis → the mesh axes that shard it. An axis without a rule is replicated; a layout without rules
            is for one device, and leaves every array as it is.
    """

    rules: Mapping[str, MeshAxes] = field(default_factory=dict, hash=False)

    def mesh_axes(self, *axes: str) -> frozenset[str]:
        """Returns the mesh axes that shard any of these logical axes."""
        return frozenset(mesh for axis in axes for mesh in as_tuple(self.rules.get(axis)))

    @property
    def token_axes(self) -> frozenset[str]:
        """The mesh axes that shard the positions of a batch: a weight's gradient is summed over them."""
        return self.mesh_axes("batch", "time")

    @property
    def replica_axes(self) -> frozenset[str]:
        """The axes of the ambient mesh whose devices have rows of their own, and copies of all weights."""
        sizes = jax.sharding.get_abstract_mesh().shape
        of_weights = self.mesh_axes(*self.rules.keys() - {"batch", "sequence", "time"})
        return frozenset(axis for axis in self.mesh_axes("batch") - of_weights if sizes[axis] > 1)

    def size(self, axis: str) -> int:
        """Returns the number of shards of a logical axis on the ambient mesh."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[mesh] for mesh in self.mesh_axes(axis))

    def spec(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec:
        """Returns the partition of an array with these logical axes; None stands for a replicated axis."""
        return PartitionSpec(*(self.rules.get(axis) if axis else None for axis in axes), **partial)

    def out_sharding(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec | None:
        """Returns `spec`, or None without rules: what JAX's functions take as `out_sharding`."""
        return self.spec(*axes, **partial) if self.rules else None

    def reshard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Returns the array with the sharding of these logical axes."""
        return jax.reshard(x, self.spec(*axes)) if self.rules else x


UNSHARDED = Layout()


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """Returns the mesh axes of a rule as a tuple, which is empty for None."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def split_axis(x: jax.Array, axis: int, parts: int, whole: bool = False) -> jax.Array:
    """Reshapes [..., n, ...] to [..., parts, n / parts, ...].

    Args:
        whole: the parts are not sharded, and inside them is the sharding of n; else the other way round.
    """
    shape, spec = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :]), _partitions(x)
    both = (None, spec[axis]) if whole else (spec[axis], None)
    return _reshape(x, shape, (*spec[:axis], *both, *spec[axis + 1 :]), 1 in shape[: axis + 1])


def join_axis(x: jax.Array, axis: int) -> jax.Array:
    """Reshapes this axis and the next to one, with the sharding of either: the inverse of `split_axis`."""
    shape, spec = (*x.shape[:axis], -1, *x.shape[axis + 2 :]), _partitions(x)
    joined = spec[axis] if spec[axis] is not None else spec[axis + 1]
    return _reshape(x, shape, (*spec[:axis], joined, *spec[axis + 2 :]), 1 in x.shape[: axis + 1])


def is_whole(x: jax.Array, axis: int) -> bool:
    """True if an axis is not sharded."""
    return _partitions(x)[axis] is None


def _partitions(x: jax.Array) -> tuple[MeshAxes, ...]:
    partitions = jax.typeof(x).sharding.spec.partitions
    return (*partitions, *(None,) * (x.ndim - len(partitions)))


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[MeshAxes, ...], explicit: bool) -> jax.Array:
    # JAX infers the sharding of a reshape's result except at or behind an axis of size 1, whose mesh axes it drops
    # (tests/model/test_workarounds.py). Where `out_sharding` isn't needed, it adds copies.
    explicit = explicit and not jax.typeof(x).sharding.mesh.empty
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*spec) if explicit else None)
