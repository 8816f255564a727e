"""Searches the meshes, accumulation parts, remat policies and batch sizes of a run on given devices for the fastest."""

import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from data.errors import InputError
from model.decoder import REMAT_POLICIES
from model.kernels import choose_kernel
from train.config.config import ResolvedConfig
from train.config.reading import config_problems
from train.devices.hardware import Chip
from train.devices.mesh import count_slices, make_mesh, mesh_shape, one_device_mesh
from train.devices.mesh_checks import mesh_problems
from train.devices.rules import AXES, training_layout
from train.planning.estimate import Estimate, Machine, estimate
from train.planning.plan import argument_bytes
from train.planning.speed import reached_bandwidth

AXES_IN_SLICE = AXES[1:]
BATCH = "train.batch_size"
PARTS = "train.accumulation_steps"
REMAT = "model.remat_policy"
SEARCHED = (*(f"mesh.{axis}" for axis in AXES_IN_SLICE), BATCH, PARTS, REMAT)
# Largest expected relative error of an estimated peak, and of estimated seconds after correction by compiled steps of
# the same topology: docs/scaling.md has the measured errors.
PEAK_ERROR = 0.2
SECONDS_ERROR = 0.2


class NothingFits(InputError):
    """No legal way to run a step may fit into the memory of the devices."""


class Candidate(NamedTuple):
    """One way to run a step."""

    changes: dict[str, str]  # fields in which it differs from other candidates, as the command line takes them
    mesh: dict[str, int]  # size by mesh axis
    batch_size: int  # rows of a step
    rows: int  # rows of one accumulation part on one device
    estimate: Estimate  # figures from sizes alone, before compilation


def interleaved(by_batch: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Returns the candidates of several batch sizes in one list: the first of each size, then the second, and so on."""
    return [c for of_each_size in itertools.zip_longest(*by_batch) for c in of_each_size if c is not None]


def candidates(config: ResolvedConfig, devices: Sequence[Any], chip: Chip, given: Collection[str]) -> list[Candidate]:
    """Returns all candidates that are legal and may fit, by estimated time; those that may not fit come last.

    All have the config's batch size, because it affects learning. A device's share of it follows from the mesh and the
    number of accumulation parts. Raises InputError if no candidate is legal, NothingFits if none may fit.
    Fields that are `given` keep the config's values.
    """
    legal = list(_legal(config, devices, chip, given))
    if not legal:
        # The config's own mesh is not legal either, so this raises an InputError that says why.
        make_mesh(config, devices)
    assert legal
    fitting = [c for c in legal if c.estimate.peak_bytes * (1 - PEAK_ERROR) <= chip.memory_bytes]
    if not fitting:
        least = min(c.estimate.peak_bytes for c in legal) / 2**30
        raise NothingFits(
            f"none of {len(legal)} legal steps of {config.train.batch_size:,} rows may fit: the smallest is estimated "
            f"at {least:.1f} GiB of {chip.memory_bytes / 2**30:.1f} GiB a device; give more devices or a smaller model"
        )
    return sorted(fitting, key=lambda c: (c.estimate.peak_bytes > chip.memory_bytes, c.estimate.step_seconds))


def worth_compiling(candidate: Candidate, compiled: Sequence[tuple[Candidate, float]]) -> bool:
    """True if a candidate may be faster than the best compiled one of its batch size, within the estimates' error.

    The seconds of the `compiled` candidates' steps correct the common error of all estimates.
    """
    of_its_size = [seconds for other, seconds in compiled if other.batch_size == candidate.batch_size]
    if not of_its_size:
        return True
    correction = statistics.median(seconds / other.estimate.step_seconds for other, seconds in compiled)
    return candidate.estimate.step_seconds * correction * (1 - SECONDS_ERROR) < min(of_its_size)


def _legal(config: ResolvedConfig, devices: Sequence[Any], chip: Chip, given: Collection[str]) -> Iterator[Candidate]:
    rows = config.train.batch_size
    all_parts = [config.train.accumulation_steps] if PARTS in given else _divisors(rows)
    policies = [config.model.remat_policy] if REMAT in given else list(REMAT_POLICIES)
    # SOAP's bases are shared by more devices than the weights, on every mesh by others.
    state = None if config.optimizer.name in ("soap", "soap_muon") else _state_share(config, one_device_mesh())
    batch_axes = training_layout(config.mesh).mesh_axes("batch")
    num_slices = config.mesh.slices or count_slices(devices)
    for axis_sizes in _meshes(config, len(devices) // num_slices, given):
        mesh_fields = {f"mesh.{axis}": size for axis, size in axis_sizes.items()}
        on_mesh = replace(config, mesh=replace(config.mesh, **axis_sizes))
        shape = mesh_shape(on_mesh.mesh, len(devices), num_slices)
        machine = None
        for parts in all_parts:
            in_parts = replace(on_mesh, train=replace(on_mesh.train, accumulation_steps=parts))
            if config_problems(in_parts) or mesh_problems(in_parts, shape):
                continue
            try:
                machine = machine or _machine(in_parts, devices, chip, state)
            except InputError:
                # The requested attention kernel cannot run on this mesh.
                break
            share = rows // parts // math.prod(machine.shape[name] for name in batch_axes)
            for policy in policies:
                changed = replace(in_parts, model=replace(in_parts.model, remat_policy=policy))
                fields = mesh_fields | {BATCH: rows, PARTS: parts, REMAT: policy}
                changes = {name: str(value) for name, value in fields.items()}
                yield Candidate(changes, dict(machine.shape), rows, share, estimate(changed, machine))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _meshes(config: ResolvedConfig, devices: int, given: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the sizes of the axes of all meshes of a slice, except for sizes other than the given ones."""
    choices = []
    for axis in AXES_IN_SLICE:
        own = getattr(config.mesh, axis)
        is_given = f"mesh.{axis}" in given and own != -1
        # Without experts there is nothing to share on their axis.
        fixed = is_given or (axis == "expert" and config.model.num_experts is None)
        choices.append([own] if fixed else _divisors(devices))
    for sizes in itertools.product(*choices):
        if math.prod(sizes) == devices:
            yield dict(zip(AXES_IN_SLICE, sizes, strict=True))


def _state_share(config: ResolvedConfig, mesh: Mesh) -> float:
    """Returns the bytes of a step's state on a device of the mesh for each byte of its weights."""
    sizes = argument_bytes(config, mesh)
    return (sum(sizes.values()) - sizes["batch"]) / sizes["weights"]


def _machine(config: ResolvedConfig, devices: Sequence[Any], chip: Chip, state: float | None) -> Machine:
    mesh = make_mesh(config, devices)
    state = _state_share(config, mesh) if state is None else state
    with jax.set_mesh(mesh):
        attention = choose_kernel(config.model, training_layout(config.mesh), config.data.segment_length)
    bandwidth = reached_bandwidth(mesh, chip)
    return Machine(dict(mesh.shape), chip, bandwidth, attention, state)
