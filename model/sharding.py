"""Logical axis names, and where one table of rules puts them on the ambient mesh.

The decoder names what its axes mean; which devices hold which part is data, passed in as `Layout`. Mesh axes are
Explicit: a sharding is part of an array's type, so a wrong one is an error while tracing. In a type, `reduced` says
"the gradient of this is summed over these mesh axes later", `unreduced` "this still has to be": together they place
each gradient's one reduction where it is scattered into shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """A table logical axis → mesh axes, and the few moves that the decoder makes with it.

    Attributes:
        rules: logical axis → the mesh axes that share it; none or missing: every device has it whole. Without any
            rules every move is the identity, on one device.
        gathered: mesh axes over which weights are only stored in shards, and gathered before use (FSDP).
    """

    rules: Mapping[str, MeshAxes] = field(default_factory=dict, hash=False)
    gathered: tuple[str, ...] = ()

    def mesh_axes(self, axis: str) -> frozenset[str]:
        """The mesh axes that share a logical axis."""
        found = self.rules.get(axis)
        return frozenset((found,) if isinstance(found, str) else found or ())

    def spec(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*(self.rules.get(axis) if axis else None for axis in axes), **partial)

    def sharding(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec | None:
        """`spec`, or none where there are no rules: what JAX takes as `out_sharding`."""
        return self.spec(*axes, **partial) if self.rules else None

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Activations in the layout of these axes."""
        return jax.reshard(x, self.spec(*axes)) if self.rules else x

    def gather(self, weight: jax.Array, *axes: str | None) -> jax.Array:
        """A weight for use: whole over the `gathered` mesh axes. Its gradient is summed over the batch's shards."""
        if not self.rules:
            return weight
        kept = (None if mesh in self.gathered else mesh for mesh in self.spec(*axes))
        return jax.reshard(weight, PartitionSpec(*kept, reduced=self.mesh_axes("batch")))

    def gather_sequence(self, x_BTD: jax.Array) -> jax.Array:
        """Whole sequences for products whose weights are shared over `tensor` (Korthikanti et al. 2022)."""
        if not self.rules:
            return x_BTD
        return jax.reshard(x_BTD, self.spec("batch", None, None, reduced=self.mesh_axes("sequence")))

    def partial_sums(self) -> PartitionSpec | None:
        """The type of a [B, T, D] product that is still to be summed over `tensor`."""
        return self.sharding("batch", None, None, unreduced=self.mesh_axes("sequence"))

    def scatter_sequence(self, sums_BTD: jax.Array) -> jax.Array:
        """Sum the `partial_sums`, each device keeping its part of the sequence."""
        return self.place(sums_BTD, "batch", "sequence", None)


WHOLE = Layout()


def split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """[..., n, ...] as [..., parts, n / parts, ...]; the parts are where n was."""
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return _reshape(x, shape, axis, (*jax.typeof(x).sharding.spec.partitions[: axis + 1], None))


def join_axis(x: jax.Array, axis: int) -> jax.Array:
    """The inverse: this axis and the next as one."""
    shape = (*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return _reshape(x, shape, axis, jax.typeof(x).sharding.spec.partitions[: axis + 1])


def _reshape(x: jax.Array, shape: tuple[int, ...], axis: int, spec: tuple[MeshAxes, ...]) -> jax.Array:
    """JAX finds the shards after a reshape itself, but not behind a size of 1, and where it is told the compiler
    moves more than it must.
    """
    told = 1 in x.shape[:axis] and not jax.typeof(x).sharding.mesh.empty
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*spec) if told else None)


def on_one_cpu() -> bool:
    """Whether the ambient mesh is a single CPU: there a program may be larger, if that makes it faster."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == 1 and mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu"
