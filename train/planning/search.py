"""Which meshes, parts of a batch and remat policies a run can have on given devices, by how long its step may take."""

import functools
import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from data.errors import InputError
from model.decoder import REMAT_POLICIES
from model.kernels import choose_kernel
from train.config.checks import config_problems
from train.config.config import Config
from train.devices.hardware import Chip
from train.devices.mesh import make_mesh, mesh_shape, on_one_device
from train.devices.mesh_checks import mesh_problems
from train.devices.rules import AXES, training_layout
from train.planning.estimate import Estimate, Machine, estimate
from train.planning.plan import argument_bytes
from train.planning.topology import bandwidth_over

SHARED = AXES[1:]
PARTS, REMAT = "train.accumulation_steps", "model.remat_policy"
SEARCHED = (*(f"mesh.{axis}" for axis in SHARED), PARTS, REMAT)
# By how much a compiled step's peak may lie below its estimate, and its seconds below theirs where others on the same
# topology lie: docs/scaling.md has what was measured.
PEAK_ERROR, SECONDS_ERROR = 0.2, 0.2


class Candidate(NamedTuple):
    """One way to run a step.

    Attributes:
        changes: the fields in which it differs from others, as the command line takes them.
        mesh: sizes by axis.
        rows: of a part of the batch on a device.
        estimate: before anything is compiled.
    """

    changes: dict[str, str]
    mesh: dict[str, int]
    rows: int
    estimate: Estimate


def candidates(config: Config, devices: Sequence[Any], chip: Chip, given: Collection[str]) -> list[Candidate]:
    """All that are legal and may fit: those that should, the fastest first by their estimates, then the others.

    The batch of a step stays: it is part of what is learned. A device's part of it follows from the mesh and from the
    number of parts.

    Args:
        config: resolved.
        devices: of the topology.
        chip: figures of a device; its memory is what a program can have.
        given: fields that stay as the config has them.

    Raises:
        InputError: none is legal, or none may fit.
    """
    legal = list(_legal(config, devices, chip, given))
    if not legal:
        # The config's own mesh is not legal, either, and can say why.
        make_mesh(config, devices)
    assert legal
    fitting = [c for c in legal if c.estimate.peak_bytes * (1 - PEAK_ERROR) <= chip.memory_bytes]
    if not fitting:
        least = min(c.estimate.peak_bytes for c in legal) / 2**30
        raise InputError(
            f"none of {len(legal)} legal steps may fit: the smallest is estimated at {least:.1f} GiB of "
            f"{chip.memory_bytes / 2**30:.1f} GiB a device; give more devices or a smaller model"
        )
    return sorted(fitting, key=lambda c: (c.estimate.peak_bytes > chip.memory_bytes, c.estimate.step_seconds))


def worth_compiling(candidate: Candidate, compiled: Sequence[tuple[Candidate, float]]) -> bool:
    """Whether it may be faster than what is compiled already, for all that the estimates' error allows.

    Args:
        candidate: the next one.
        compiled: others, with the seconds of their steps. By how much all estimates are off alike they tell.
    """
    if not compiled:
        return True
    alike = statistics.median(seconds / other.estimate.step_seconds for other, seconds in compiled)
    best = min(seconds for _, seconds in compiled)
    return candidate.estimate.step_seconds * alike * (1 - SECONDS_ERROR) < best


def _legal(config: Config, devices: Sequence[Any], chip: Chip, given: Collection[str]) -> Iterator[Candidate]:
    own = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in SHARED} | {
        PARTS: config.train.accumulation_steps, REMAT: config.model.remat_policy
    }  # fmt: skip
    rows, slices = config.train.batch_size, {getattr(device, "slice_index", 0) for device in devices}
    all_parts = [own[PARTS]] if PARTS in given else [n for n in range(1, rows + 1) if rows % n == 0]
    policies = [own[REMAT]] if REMAT in given else list(REMAT_POLICIES)
    state = _state(config)
    num_slices = config.mesh.slices or (len(slices) if devices[0].platform == "tpu" else 1)
    for sizes in _factors(len(devices) // num_slices, len(SHARED)):
        of_axis: dict[str, Any] = dict(zip(SHARED, sizes, strict=True))
        asked = {f"mesh.{axis}": size for axis, size in of_axis.items()}
        if any(own[name] not in (size, -1) for name, size in asked.items() if name in given):
            continue
        on_mesh = replace(config, mesh=replace(config.mesh, **of_axis))
        shape = mesh_shape(on_mesh.mesh, len(devices), num_slices)
        machine = None
        for parts in all_parts:
            in_parts = replace(on_mesh, train=replace(on_mesh.train, accumulation_steps=parts))
            if config_problems(in_parts) or mesh_problems(in_parts, shape):
                continue
            try:
                machine = machine or _machine(in_parts, devices, chip, state)
            except InputError:
                # A kernel that is asked for cannot be on this mesh.
                break
            share = rows // parts // math.prod(machine.shape[name] for name in _batch_axes(config))
            for policy in policies:
                changed = replace(in_parts, model=replace(in_parts.model, remat_policy=policy))
                changes = {name: str(value) for name, value in (asked | {PARTS: parts, REMAT: policy}).items()}
                yield Candidate(changes, dict(machine.shape), share, estimate(changed, machine))


def _batch_axes(config: Config) -> Collection[str]:
    return training_layout(config.mesh).mesh_axes("batch")


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    for sizes in itertools.product(divisors, repeat=count - 1):
        if number % math.prod(sizes) == 0:
            yield (*sizes, number // math.prod(sizes))


def _machine(config: Config, devices: Sequence[Any], chip: Chip, state: float) -> Machine:
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        kernel = choose_kernel(config.model, training_layout(config.mesh), config.data.segment_length).kernel
    bandwidth = functools.cache(lambda axes: bandwidth_over(mesh, axes, chip))
    return Machine(dict(mesh.shape), chip, bandwidth, kernel, state)


def _state(config: Config) -> float:
    """Bytes of the state for each byte of the weights, the same on all meshes."""
    given = argument_bytes(config, on_one_device())
    return (sum(given.values()) - given["batch"]) / given["weights"]
