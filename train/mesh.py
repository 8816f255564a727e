"""Devices: arranging those of all processes on named axes, and who holds what."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from data.errors import InputError
from model.config import ModelConfig
from model.kernels import choose
from model.parameters import parameter_table
from model.sharding import Layout, MeshAxes, as_tuple
from train.config import Config, MeshConfig

AXES = ("slice", "data", "fsdp", "context", "tensor")

# Logical axis → mesh axes. Weights are stored in shards of their model width and gathered for use, a layer at a time;
# `tensor` shares heads, feed-forward width and vocabulary, and between them the residual stream's positions; `context`
# shares the positions everywhere. Slices, whose links to each other are slow, and `data` have whole copies.
RULES: dict[str, MeshAxes] = {
    "batch": ("slice", "data", "fsdp"),
    "sequence": ("context", "tensor"),
    "time": ("context",),
    "model": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "feedforward": ("tensor",),
    "vocabulary": ("tensor",),
    "lookup": ("tensor",),
}
TRAINING = Layout(RULES)
# One sequence at a time on all devices: nothing to share over the batch or the positions.
GENERATION = Layout(RULES | {"batch": None, "sequence": None, "time": None})
# What the decoder makes, by its logical axes: in none of them may two axes be shared by the same mesh axis.
ARRAYS = (
    ("batch", "sequence"),
    ("batch", "time", "heads"),
    ("batch", "time", "kv_heads"),
    ("batch", "time", "feedforward"),
    ("batch", "time", "vocabulary"),
)


def training_layout(config: MeshConfig) -> Layout:
    """The rules with what the config changes of them."""
    return Layout(RULES | {axis: tuple(mesh) for axis, mesh in config.rules.items()})


def once(action: Callable[[], Any]) -> None:
    """Process 0 does it; the others wait until it is done."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")


def gathered(value: Any) -> list[Any]:
    """The values of all processes, which JSON can hold, by process; all call it together."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(everyones, sizes.tolist(), strict=True)]


def told(make: Callable[[], Any]) -> Any:
    """A value that JSON can hold, made by process 0 for all."""
    return gathered(make() if jax.process_index() == 0 else None)[0]


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


def rule_problems(config: MeshConfig) -> list[str]:
    """What is wrong with `mesh.rules`: names that don't exist, and mesh axes that two axes of one array would share."""
    found = []
    for axis, mesh in config.rules.items():
        if axis not in RULES:
            found.append(f"mesh.rules: there is no logical axis {axis!r}; there are {', '.join(RULES)}")
        if not isinstance(mesh, list | tuple) or not all(isinstance(name, str) for name in mesh):
            found.append(f'mesh.rules.{axis} is {mesh!r}; it must be a list of mesh axes, as in ["fsdp"]')
            continue
        for name in mesh:
            if name not in AXES:
                found.append(f"mesh.rules.{axis}: there is no mesh axis {name!r}; there are {', '.join(AXES)}")
    if found:
        return found
    layout = training_layout(config)
    for axes in ARRAYS:
        names = [name for axis in axes for name in as_tuple(layout.rules[axis])]
        for name in sorted({name for name in names if names.count(name) > 1}):
            sharing = " and ".join(f"{axis!r}" for axis in axes if name in layout.mesh_axes(axis))
            found.append(f"mesh.rules: {sharing} of one array are both shared by {name!r}; take it from one of them")
    for axis, parts in layout.rules.items():
        for name in sorted({name for name in as_tuple(parts) if as_tuple(parts).count(name) > 1}):
            found.append(f"mesh.rules.{axis}: {name!r} stands there twice")
    for axis in ("heads", "kv_heads", "feedforward", "vocabulary"):
        for name in sorted(layout.mesh_axes(axis) & layout.mesh_axes("model")):
            found.append(f"mesh.rules: {axis!r} and 'model' of one weight are both shared by {name!r}")
    if layout.rules["heads"] != layout.rules["kv_heads"]:
        found.append("mesh.rules: 'heads' and 'kv_heads' must be shared by the same mesh axes: queries meet their keys")
    inside, between = as_tuple(layout.rules["time"]), as_tuple(layout.rules["sequence"])
    if between[: len(inside)] != inside:
        found.append("mesh.rules: 'sequence' must begin with the mesh axes of 'time', and may go on with others")
    return found


def mesh_problems(config: Config, shape: tuple[int, ...]) -> list[str]:
    """What this model and batch cannot share over this mesh, one line each, naming field, axis and sizes that work."""
    size, layout = dict(zip(AXES, shape, strict=True)), training_layout(config.mesh)
    rows = config.train.batch_size // config.train.accumulation_steps
    must_divide = partial(indivisible, layout, size)
    found = must_divide("train.batch_size / train.accumulation_steps", rows, "batch")
    if config.train.batch_ramp_start:
        # The later stages are multiples of it, and their parts of it or of a part of the full batch.
        found += must_divide("train.batch_ramp_start", config.train.batch_ramp_start, "batch")
    found += must_divide("data.num_streams", config.num_streams, "batch")
    # Each device takes a piece from either end: `Layout.order`.
    time = math.prod(size[mesh] for mesh in layout.mesh_axes("time"))
    found += must_divide("data.segment_length", config.data.segment_length, "sequence")
    if time > 1:
        found += must_divide("data.segment_length", config.data.segment_length, "time", pieces=2)
    return found + weight_problems(config.model, layout, size)


def weight_problems(config: ModelConfig, layout: Layout, size: Mapping[str, int]) -> list[str]:
    """Those of the model's weights alone, over mesh axes of these sizes."""
    fields = {"model": "model_dim", "heads": "num_heads", "kv_heads": "num_kv_heads", "feedforward": "feedforward_dim"}
    found, seen = [], set()
    for parameter in parameter_table(config).values():
        for axis, number in parameter.axes.items():
            if layout.mesh_axes(axis) and axis not in seen:
                seen.add(axis)
                name = f"model.{fields.get(axis, axis)}" + (" (padded)" if axis == "vocabulary" else "")
                found += indivisible(layout, size, name, number, axis)
    return found


def indivisible(
    layout: Layout, size: Mapping[str, int], name: str, number: int, axis: str, pieces: int = 1
) -> list[str]:
    """A line where the mesh axes that share a logical axis, in so many pieces each, do not divide a number."""
    names = [mesh for mesh in AXES if mesh in layout.mesh_axes(axis)]
    by = math.prod(size[mesh] for mesh in names) * pieces
    if number % by == 0:
        return []
    works = [d for d in range(1, by // pieces + 1) if number % (d * pieces) == 0]
    # Slices are counted, not chosen.
    shown = " × ".join(f"mesh.{mesh}" + ("s" if mesh == "slice" else "") for mesh in names
                       if size[mesh] > 1) or f"mesh.{names[0]}"  # fmt: skip
    most = f"; nearest size that works: {works[-1]}" if works else ""
    times = f" in {pieces} pieces each" if pieces > 1 else ""
    return [f"{name} = {number} cannot be shared by {shown} = {by // pieces}{times}{most}"]


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
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
            choose(config.model, training_layout(config.mesh), config.data.segment_length)
        except ValueError as error:
            raise InputError(str(error)) from None
    return mesh


def explicit_mesh(devices: np.ndarray) -> Mesh:
    """A mesh of an array of devices, which has a dimension for each of AXES."""
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_sharding(mesh: Mesh, layout: Layout = TRAINING) -> NamedSharding:
    """Of the arrays [B, T] of a global batch, in the order of its rows."""
    return NamedSharding(mesh, layout.spec("batch", None))


def on_one_device() -> Mesh:
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


def check_sharing(config: ModelConfig) -> None:
    """InputError where the ambient mesh cannot share a model's weights."""
    if problems := weight_problems(config, TRAINING, jax.sharding.get_mesh().shape):
        raise InputError("\n".join(problems))
