"""Checks replicas: copies of the same array on several devices must be equal, bit for bit.

A device that computes wrongly now and then shows in nothing else (Llama 3, Dubey et al. 2024, report such errors).
"""

import functools
import math
from collections import Counter
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.errors import Fault
from model.sharding import as_tuple
from model.trees import flattened
from train.checkpoint.checksum import checksums
from train.checkpoint.trees import to_plain_tree
from train.step.state import State


def check_replicas(state: State) -> None:
    """Raises Fault if copies of a shard differ, by their checksums. All processes call it together."""
    arrays = {name: x for name, x in flattened(to_plain_tree(state)).items() if _axes_of_copies(x)}
    if not arrays:
        return
    shardings = [cast(NamedSharding, x.sharding) for x in arrays.values()]
    mesh = cast(Mesh, shardings[0].mesh)
    sums = _device_checksums(mesh, tuple(sharding.spec for sharding in shardings))(tuple(arrays.values()))
    sums = np.asarray(multihost_utils.process_allgather(sums, tiled=True))
    for (name, x), device_sums in zip(arrays.items(), sums, strict=True):
        axes = [mesh.axis_names.index(axis) for axis in _axes_of_copies(x)]
        # One row for each group of devices with copies of the same shard.
        rows = (-1, math.prod(mesh.devices.shape[axis] for axis in axes))
        last = range(-len(axes), 0)
        sums_of_groups = np.moveaxis(device_sums, axes, last).reshape(rows)
        groups = np.moveaxis(mesh.devices, axes, last).reshape(rows)
        wrong = [device for row, group in zip(sums_of_groups, groups, strict=True) for device in _outliers(row, group)]
        if wrong:
            who = ", ".join(f"device {device.id} of process {device.process_index}" for device in wrong)
            raise Fault(
                f"copies of {name} differ between devices; those of {who} are not as most are. The state is not saved: "
                "the next start resumes from the last save. If it happens again, take that machine out"
            )


@jax.jit
def is_finite(state: State) -> jax.Array:
    """Returns true if every number of a state is finite."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def _axes_of_copies(x: jax.Array) -> list[str]:
    """Returns the mesh axes, of size above 1, along which the devices have copies of the same shard."""
    sharding = cast(NamedSharding, x.sharding)
    used = {name for part in sharding.spec for name in as_tuple(part)}
    return [axis for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used]


def _outliers(sums: np.ndarray, devices: np.ndarray) -> list[Any]:
    """Returns the devices whose checksum is not the most frequent one; both, if there are two that differ."""
    (agreed, count), *others = Counter(sums.tolist()).most_common()
    tied = bool(others) and others[0][1] == count
    return [device for device, checksum in zip(devices, sums.tolist(), strict=True) if tied or checksum != agreed]


@functools.cache
def _device_checksums(mesh: Mesh, specs: tuple[Hashable, ...]) -> Any:
    """Returns the compiled function from arrays with these specs to uint32 [arrays, *mesh], checksums of shards."""

    def of_device(parts: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack(checksums(parts)).reshape(-1, *(1,) * len(mesh.axis_names))

    everywhere = PartitionSpec(None, *mesh.axis_names)
    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=(specs,), out_specs=everywhere, check_vma=False))
