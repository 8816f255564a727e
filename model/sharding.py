"""Logical axis names, and where one table of rules puts them on the ambient mesh.

The decoder names what its axes mean; which devices hold which part is data, passed in as `Layout`. Mesh axes are
Explicit: a sharding is part of an array's type, so a wrong one is an error while tracing. In a type, `reduced` says
"the gradient of this is summed over these mesh axes later", `unreduced` "this still has to be": together they place
each gradient's one reduction where it is scattered into shards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """A table logical axis → mesh axes, and the few moves that the decoder makes with it.

    Activations have "batch"; "sequence" on the residual stream and "time" inside the floors; "heads", "kv_heads",
    "feedforward" and "vocabulary" by what they hold. Weights have these and "model", which is how they are stored only:
    it is gathered before use (FSDP). "lookup" shares D while tables are looked up, beside "model".

    Attributes:
        rules: logical axis → the mesh axes that share it; none or missing: every device has it whole. Without any
            rules every move is the identity, on one device.
        inputs_last: each layer has its own weights, of which the axes that are summed over come last: see
            `model.generation.weights.prepared`.
    """

    rules: Mapping[str, MeshAxes] = field(default_factory=dict, hash=False)
    inputs_last: bool = False

    def mesh_axes(self, *axes: str) -> frozenset[str]:
        """The mesh axes that share any of these logical axes."""
        return frozenset(mesh for axis in axes for mesh in as_tuple(self.rules.get(axis)))

    def spec(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*(self.rules.get(axis) if axis else None for axis in axes), **partial)

    def sharding(self, *axes: str | None, **partial: frozenset[str]) -> PartitionSpec | None:
        """`spec`, or none where there are no rules: what JAX takes as `out_sharding`."""
        return self.spec(*axes, **partial) if self.rules else None

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Activations in the layout of these axes."""
        return jax.reshard(x, self.spec(*axes)) if self.rules else x

    @property
    def tokens(self) -> frozenset[str]:
        """The mesh axes over which the gradient of a weight is summed: those that share the positions of a batch."""
        return self.mesh_axes("batch", "time")

    def gather(self, weight: jax.Array, *axes: str | None) -> jax.Array:
        """A weight for use: whole but for what its products share. Its gradient is summed over all tokens.

        One mesh axis at a time, the innermost first, so that the backward pass scatters the sums of each among its own
        devices, and sums over copies of the weight (`data`, slices) what is left: a part of it.
        """
        if not self.rules:
            return weight
        parts = [as_tuple(self.rules.get(axis)) if axis else () for axis in axes]
        used = [() if axis == "model" else part for axis, part in zip(axes, parts, strict=True)]
        stored = {mesh for part in parts for mesh in part}
        reduced = self.tokens - stored
        while True:
            weight = jax.reshard(weight, PartitionSpec(*parts, reduced=reduced))
            if parts == used:
                return weight
            parts = [part[:-1] if part != own else own for part, own in zip(parts, used, strict=True)]
            reduced = self.tokens - {mesh for part in parts for mesh in part}

    def factor_of_sums(self, factor: jax.Array) -> jax.Array:
        """A scalar for gradients of weights that are still to be summed over all tokens."""
        return jax.reshard(factor, self.spec(reduced=self.tokens)) if self.rules else factor

    def gather_time(self, x_BTD: jax.Array, over: str) -> jax.Array:
        """Residuals for products whose weights share the axis `over` (Korthikanti et al. 2022, arXiv:2205.05198).

        Each device gets the positions of all that share it with. In the backward pass its gradients are summed over
        them, each keeping its positions.
        """
        if not self.rules:
            return x_BTD
        return jax.reshard(x_BTD, self.spec("batch", "time", None, reduced=self.mesh_axes(over)))

    def partial_sums(self, over: str) -> PartitionSpec | None:
        """The type of a [B, T, D] product that is still to be summed over the devices that share the axis `over`."""
        return self.sharding("batch", "time", None, unreduced=self.mesh_axes(over))

    def scatter_time(self, sums_BTD: jax.Array) -> jax.Array:
        """Sum the `partial_sums`, each device keeping its positions of the residual stream."""
        return self.place(sums_BTD, "batch", "sequence", None)

    def gather_keys(self, k_BKTC: jax.Array) -> jax.Array:
        """Keys or values of all positions, for the queries that each device has."""
        if not self.mesh_axes("time"):
            return k_BKTC
        return jax.reshard(k_BKTC, self.spec("batch", "kv_heads", None, None, reduced=self.mesh_axes("time")))

    def size(self, axis: str) -> int:
        """The devices that share a logical axis."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[mesh] for mesh in self.mesh_axes(axis))

    def order(self, T: int) -> np.ndarray:
        """The place in its row of each position [T] on the devices, int32.

        Where n devices share the time, a row is cut in 2n pieces and device i takes the i-th from either end: of causal
        attention all then have the same work (Llama Team 2024, section 3.3.2).
        """
        n = self.size("time")
        if n == 1:
            return np.arange(T, dtype=np.int32)
        pieces = np.arange(T, dtype=np.int32).reshape(2 * n, -1)
        return np.stack([pieces[:n], pieces[n:][::-1]], axis=1).reshape(T)

    def spread(self, x_BT: jax.Array) -> jax.Array:
        """An array of a batch, in the order of its rows, as the devices take it: see `order`."""
        if not self.mesh_axes("time"):
            return x_BT
        whole = self.place(x_BT, "batch", None)
        return self.place(whole[:, self.order(x_BT.shape[1])], "batch", "time")


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


UNSHARDED = Layout()


def split_axis(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """[..., n, ...] as [..., parts, n / parts, ...]; the parts are where n was."""
    shape, spec = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :]), _partitions(x)
    return _reshape(x, shape, (*spec[: axis + 1], None, *spec[axis + 1 :]), 1 in shape[: axis + 1])


def join_axis(x: jax.Array, axis: int) -> jax.Array:
    """The inverse: this axis and the next as one."""
    shape, spec = (*x.shape[:axis], -1, *x.shape[axis + 2 :]), _partitions(x)
    return _reshape(x, shape, (*spec[: axis + 1], *spec[axis + 2 :]), 1 in x.shape[: axis + 1])


def _partitions(x: jax.Array) -> tuple[MeshAxes, ...]:
    found = jax.typeof(x).sharding.spec.partitions
    return (*found, *(None,) * (x.ndim - len(found)))


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[MeshAxes, ...], told: bool) -> jax.Array:
    """JAX finds the shards after a reshape itself, but not at or behind a size of 1; where it is told without need,
    the compiler moves more than it must.
    """
    told = told and not jax.typeof(x).sharding.mesh.empty
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*spec) if told else None)
