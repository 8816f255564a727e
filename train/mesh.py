"""Devices: joining the other processes, arranging all devices on named axes, and who holds what."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from data.errors import InputError
from model.parameters import parameter_table
from model.sharding import Layout, MeshAxes
from train.config import Config, MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis → mesh axes. Weights are stored in `fsdp` shards of their model width and gathered for use, a layer at
# a time; `tensor` shares heads, feed-forward width and vocabulary, and between them the residual stream's sequence.
RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "sequence": "tensor",
    "model": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feedforward": "tensor",
    "vocabulary": "tensor",
    "lookup": "tensor",
}
TRAINING = Layout(RULES, gathered=("fsdp",))
# One sequence at a time on all devices: nothing to share over the batch or the sequence.
GENERATION = Layout(RULES | {"batch": None, "sequence": None}, gathered=("fsdp",))


def join_processes() -> None:
    """Connect to the other processes of this run, where `ziggurat launch` has said that there are any."""
    if "ZIGGURAT_COORDINATOR" in os.environ:
        # It would take SIGTERM as a notice of preemption, which nothing here acts on: the process would not end.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            coordinator_address=os.environ["ZIGGURAT_COORDINATOR"],
            num_processes=int(os.environ["ZIGGURAT_NUM_PROCESSES"]),
            process_id=int(os.environ["ZIGGURAT_PROCESS_ID"]),
        )


def once(action: Callable[[], Any]) -> None:
    """Process 0 does it; the others wait until it is done."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of AXES, −1 filled in. InputError where they don't come to the number of devices."""
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % given == 0:
        sizes[sizes.index(-1)] = num_devices // given
    if -1 in sizes or math.prod(sizes) != num_devices:
        asked = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise InputError(
            f"{asked} does not fit {num_devices} devices: the product of the axes must be {num_devices}, "
            "or one axis -1 and the others' product a divisor of it"
        )
    return tuple(sizes)


def mesh_problems(config: Config, shape: tuple[int, ...]) -> list[str]:
    """What this model and batch cannot share over this mesh, one line each, naming field, axis and sizes that work."""
    size = dict(zip(AXES, shape, strict=True))
    shards = size["data"] * size["fsdp"]
    rows = config.train.batch_size // config.train.accumulation_steps
    found = []

    def must_divide(name: str, number: int, axes: str, by: int) -> None:
        if number % by:
            works = [d for d in range(1, by + 1) if number % d == 0]
            found.append(f"{name} = {number} cannot be shared by {axes} = {by}; nearest size that works: {works[-1]}")

    must_divide("train.batch_size / train.accumulation_steps", rows, "mesh.data × mesh.fsdp", shards)
    if config.train.batch_ramp_start:
        # The later stages are multiples of it, and their parts of it or of a part of the full batch.
        must_divide("train.batch_ramp_start", config.train.batch_ramp_start, "mesh.data × mesh.fsdp", shards)
    must_divide("data.num_streams", config.num_streams, "mesh.data × mesh.fsdp", shards)
    must_divide("data.segment_length", config.data.segment_length, "mesh.tensor", size["tensor"])
    must_divide("model.model_dim", config.model.model_dim, "mesh.tensor", size["tensor"])
    fields = {"model": "model_dim", "heads": "num_heads", "kv_heads": "num_kv_heads", "feedforward": "feedforward_dim"}
    seen = set()
    for parameter in parameter_table(config.model).values():
        for axis, number in parameter.axes.items():
            mesh_axis = RULES.get(axis)
            if isinstance(mesh_axis, str) and axis not in seen:
                seen.add(axis)
                must_divide(f"model.{fields.get(axis, axis)}", number, f"mesh.{mesh_axis}", size[mesh_axis])
    return found


def make_mesh(config: Config) -> Mesh:
    """All devices on AXES, Explicit; `tensor` innermost, where the links are fastest.

    Raises:
        InputError: sizes that don't fit the devices, or the model and batch that don't fit the sizes.
    """
    shape = mesh_shape(config.mesh, jax.device_count())
    if problems := mesh_problems(config, shape):
        raise InputError("\n".join(problems))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of the arrays [B, T] of a global batch."""
    return NamedSharding(mesh, TRAINING.spec("batch", None))


def on_one_device() -> Mesh:
    """The mesh of a single device, for commands that need no more."""
    return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
