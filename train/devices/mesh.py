"""Meshes: the devices of all processes on named axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from data.errors import InputError
from model.config import ResolvedModelConfig
from model.kernels import choose_kernel
from model.sharding import Layout
from train.config.config import ResolvedConfig
from train.config.run_config import MeshConfig
from train.devices.mesh_checks import matmul_problems, mesh_problems, rule_problems, weight_problems
from train.devices.rules import AXES, TRAINING, training_layout


def mesh_shape(config: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, ...]:
    """Returns the sizes of AXES, with −1 filled in. Raises InputError if they do not fit the devices of a slice.

    `num_devices` counts those of all slices, and `num_slices` the slices that the devices report.
    """
    slices = config.slices or num_slices
    if num_devices % slices or slices % num_slices:
        raise InputError(f"mesh.slices={slices} does not fit {num_devices} devices in {num_slices} slices")
    devices = num_devices // slices
    axes = AXES[1:]
    sizes = [getattr(config, axis) for axis in axes]
    product = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % product == 0:
        sizes[sizes.index(-1)] = devices // product
    if -1 in sizes or math.prod(sizes) != devices:
        wanted = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in axes)
        raise InputError(
            f"{wanted} does not fit {devices} devices{' a slice' if slices > 1 else ''}: the product of the axes must "
            f"be {devices}, or one axis -1 and the product of the others a divisor of {devices}"
        )
    return (slices, *sizes)


def make_mesh(config: ResolvedConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of devices on AXES, with Explicit axis types.

    `tensor` is innermost, where links are fastest; slices are outermost. `devices` are by default all of this run.

    Raises InputError if the sizes don't fit the devices, model or batch don't fit the sizes, or the wanted kernel
    cannot be used.
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    if problems := rule_problems(config.mesh):
        raise InputError("\n".join(problems))
    shape = mesh_shape(config.mesh, len(devices), slices)
    if problems := mesh_problems(config, shape) + matmul_problems(config.model, devices[0].device_kind):
        raise InputError("\n".join(problems))
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1,) * (len(AXES) - 1))
        array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = explicit_mesh(array)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        try:
            choose_kernel(config.model, training_layout(config.mesh), config.data.segment_length)
        except ValueError as error:
            raise InputError(str(error)) from None
    return mesh


def count_slices(devices: Sequence[Any]) -> int:
    """Returns the number of TPU slices. On GPUs JAX counts hosts as slices, too; but a mesh axis may span hosts."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def explicit_mesh(devices: np.ndarray) -> Mesh:
    """Returns a mesh of an array of devices, which has a dimension for each of AXES."""
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_sharding(mesh: Mesh, layout: Layout = TRAINING) -> NamedSharding:
    """Returns the sharding of the arrays [B, T] of a global batch, in the order of its rows."""
    return NamedSharding(mesh, layout.spec("batch", None))


def one_device_mesh() -> Mesh:
    """Returns the mesh of a single device, for commands that need no more."""
    return explicit_mesh(np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES)))


def generation_mesh(config: MeshConfig) -> Mesh:
    """Returns a mesh of the first devices of this process, as the sizes of `config` need; −1 takes all others.

    Raises InputError if the process has fewer devices.
    """
    devices = jax.local_devices()
    wanted = math.prod(getattr(config, axis) for axis in AXES[1:])
    if wanted > len(devices):
        raise InputError(f"mesh.tensor × mesh.fsdp = {wanted}, but there are {len(devices)} devices")
    shape = mesh_shape(config, wanted if wanted > 0 else len(devices))
    return explicit_mesh(np.array(devices[: math.prod(shape)]).reshape(shape))


def check_sharing(config: ResolvedModelConfig) -> None:
    """Raises InputError if there is no ambient mesh, or it cannot shard a model's weights."""
    if jax.sharding.get_mesh().empty:
        raise InputError("weights are loaded onto a mesh; load them under `with jax.set_mesh(one_device_mesh()):`")
    if problems := weight_problems(config, TRAINING, jax.sharding.get_mesh().shape):
        raise InputError("\n".join(problems))
