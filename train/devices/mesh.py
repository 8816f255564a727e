"""Devices: arranging those of all processes on named axes, and who holds what."""

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
from train.devices.mesh_checks import mesh_problems, rule_problems, weight_problems
from train.devices.rules import AXES, TRAINING, training_layout


def mesh_shape(config: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, ...]:
    """Sizes of AXES, −1 filled in. InputError where they don't come to the devices of a slice.

    Args:
        config: sizes within a slice.
        num_devices: of all slices.
        num_slices: that the devices themselves tell of.
    """
    slices = config.slices or num_slices
    if num_devices % slices or slices % num_slices:
        raise InputError(f"mesh.slices={slices} does not fit {num_devices} devices in {num_slices} slices")
    devices, axes = num_devices // slices, AXES[1:]
    sizes = [getattr(config, axis) for axis in axes]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if -1 in sizes or math.prod(sizes) != devices:
        asked = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in axes)
        raise InputError(
            f"{asked} does not fit {devices} devices{' a slice' if slices > 1 else ''}: the product of the axes must "
            f"be {devices}, or one axis -1 and the others' product a divisor of it"
        )
    return (slices, *sizes)


def make_mesh(config: ResolvedConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices on AXES, Explicit; `tensor` innermost, where the links are fastest, slices outermost.

    Args:
        config: resolved, so that what the mesh must divide is known.
        devices: none: all of this run's.

    Raises:
        InputError: sizes that don't fit the devices, the model and batch that don't fit the sizes, or a kernel that
            cannot do what it is asked for.
    """
    devices = jax.devices() if devices is None else devices
    # JAX numbers GPUs' hosts so, too; but a mesh axis may reach over hosts.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if problems := rule_problems(config.mesh):
        raise InputError("\n".join(problems))
    shape = mesh_shape(config.mesh, len(devices), slices)
    if problems := mesh_problems(config, shape):
        raise InputError("\n".join(problems))
    if slices > 1:
        within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(AXES) - 1))
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


def explicit_mesh(devices: np.ndarray) -> Mesh:
    """A mesh of an array of devices, which has a dimension for each of AXES."""
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_sharding(mesh: Mesh, layout: Layout = TRAINING) -> NamedSharding:
    """Of the arrays [B, T] of a global batch, in the order of its rows."""
    return NamedSharding(mesh, layout.spec("batch", None))


def one_device_mesh() -> Mesh:
    """The mesh of a single device, for commands that need no more."""
    return explicit_mesh(np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES)))


def generation_mesh(config: MeshConfig) -> Mesh:
    """The first devices of this process, as many as the sizes of `config` come to; -1 stands for all the rest.

    Raises:
        InputError: there are not so many.
    """
    devices = jax.local_devices()
    asked = math.prod(getattr(config, axis) for axis in AXES[1:])
    if asked > len(devices):
        raise InputError(f"mesh.tensor × mesh.fsdp = {asked}, but there are {len(devices)} devices")
    shape = mesh_shape(config, asked if asked > 0 else len(devices))
    return explicit_mesh(np.array(devices[: math.prod(shape)]).reshape(shape))


def check_sharing(config: ResolvedModelConfig) -> None:
    """InputError where the ambient mesh cannot share a model's weights."""
    if problems := weight_problems(config, TRAINING, jax.sharding.get_mesh().shape):
        raise InputError("\n".join(problems))
