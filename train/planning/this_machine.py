"""Figures of this machine, for plans for its own devices: their speeds, and the measured time of a step."""

import logging
import os
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data.errors import InputError
from train.config.config import ResolvedConfig
from train.devices.hardware import Chip, chip_of
from train.devices.mesh import make_mesh
from train.step.flops import least_seconds, peak_flops
from train.step.optimizer import make_optimizer
from train.step.state import State, state_maker
from train.step.step import abstract_batch, make_train_step

MOVED_BYTES = 2**28
MOST_STEPS = 10
MOST_SECONDS = 10.0
# Steps in turns: how many of a config are a turn, how many turns there are, and for how long (seconds of each config).
STEPS_OF_A_TURN = 5
LEAST_TURNS, MOST_TURNS, SECONDS_OF_TURNS = 8, 50, 5.0
MOST_UNSURE = 1.05
log = logging.getLogger("ziggurat")


def local_chip(dtype: str) -> Chip:
    """Returns the figures of one local device; figures that no data sheet has are measured.

    CPU devices share the measured figures of the machine; `dtype` is of the products that measure the peak.
    """
    device = jax.local_devices()[0]
    sharing = jax.local_device_count()
    stats = device.memory_stats() or {}
    if known := chip_of(device.device_kind):
        return replace(known, memory_bytes=stats.get("bytes_limit", known.memory_bytes))
    if device.platform == "cpu":
        memory = memory_available() // sharing
    else:
        memory, sharing = stats.get("bytes_limit", 0), 1
    bandwidth = memory_bandwidth() / sharing
    return Chip(
        name=device.device_kind,
        device_kinds=(device.device_kind,),
        platform=device.platform,
        peak_flops=peak_flops(dtype)[0] / jax.device_count(),
        matmul_dtypes=(),
        eight_bit_flops=0.0,
        memory_bytes=memory,
        memory_bandwidth=bandwidth,
        # CPU devices communicate by copying, which reads and writes every byte.
        link_bandwidth=bandwidth / 2,
        network_bandwidth=bandwidth / 2,
        host_bandwidth=bandwidth / 2,
        max_devices=sharing,
    )


def memory_available() -> int:
    """Returns the free bytes of this machine's memory, or all bytes if the system reports no free ones."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_bandwidth() -> float:
    """Measures the bytes/s that one device reads and writes, with an array larger than its caches."""
    return 2 * MOVED_BYTES / least_seconds(lambda x: x + 1, (MOVED_BYTES // 4,), "float32")


def measured_step(config: ResolvedConfig, mesh: Mesh, executable: Any) -> float:
    """Returns the median seconds of several steps on random tokens, after one warm-up step."""
    step = partial(random_steps(config, mesh, executable)(), 1)
    step()
    seconds: list[float] = []
    while len(seconds) < MOST_STEPS and sum(seconds) < MOST_SECONDS:
        seconds.append(timeit.timeit(step, number=1))
    return sorted(seconds)[len(seconds) // 2]


def steps_in_turns(configs: Mapping[str, ResolvedConfig]) -> dict[str, float]:
    """Returns the seconds of a step of each config; they take turns, so that other load is the same for all.

    The fastest turn counts, which other load has disturbed least; a warning says where even that is unsure. A state is
    in memory for its turn alone; what stays are the programs.

    Raises InputError as `make_meshes` does.
    """
    meshes = make_meshes(configs)
    begins = {}
    for name, config in configs.items():
        with jax.set_mesh(meshes[name]):
            program = make_train_step(config, make_optimizer(config))
        begins[name] = random_steps(config, meshes[name], program)
    for begin in begins.values():
        begin()(1)  # compiles
    turns: list[dict[str, float]] = []
    begun = time.perf_counter()
    while len(turns) < LEAST_TURNS or (
        len(turns) < MOST_TURNS and time.perf_counter() - begun < SECONDS_OF_TURNS * len(begins)
    ):
        turns.append({name: time_turn(begin) for name, begin in begins.items()})
    for name in configs:
        halves = [min(turn[name] for turn in half) for half in (turns[::2], turns[1::2])]
        if max(halves) > MOST_UNSURE * min(halves):
            log.warning("%s: other load disturbs the timing, two halves of which differ by %.0f%%",
                        name, 100 * (max(halves) / min(halves) - 1))  # fmt: skip
    return {name: min(turn[name] for turn in turns) / STEPS_OF_A_TURN for name in configs}


def make_meshes(configs: Mapping[str, ResolvedConfig]) -> dict[str, Mesh]:
    """Returns the mesh of each config. Raises InputError with all configs that do not fit the devices."""
    meshes, problems = {}, []
    for name, config in configs.items():
        try:
            meshes[name] = make_mesh(config)
        except InputError as error:
            problems += [f"{name}: {line}" for line in str(error).splitlines()]
    if problems:
        raise InputError("\n".join(problems))
    return meshes


def check_meshes(configs: Mapping[str, ResolvedConfig]) -> None:
    """Raises InputError as `make_meshes` does."""
    make_meshes(configs)


def time_turn(begin: Callable[[], Callable[[int], None]]) -> float:
    """Returns the seconds of the steps of a turn (see `random_steps`); its state is gone when this returns."""
    train = begin()
    train(1)  # fills caches with it
    return timeit.timeit(partial(train, STEPS_OF_A_TURN), number=1)


def random_steps(config: ResolvedConfig, mesh: Mesh, program: Any) -> Callable[[], Callable[[int], None]]:
    """Returns a function that makes new weights, and returns another, which trains these for a number of steps.

    The batch is always of the same random tokens. All steps are dispatched, as in training, before the last is awaited.
    """
    T = config.data.segment_length
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, (config.train.batch_size, T + 1), dtype=np.int32)
    ones = np.ones_like(tokens[:, 1:])
    arrays: dict[str, np.ndarray] = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    arrays |= {"positions": ones * np.arange(T, dtype=np.int32), "segment_ids": ones, "loss_weights": ones}
    arrays["advantages"] = ones
    with jax.set_mesh(mesh):
        batch = {
            name: jax.device_put(arrays[name].astype(x.dtype), x.sharding)
            for name, x in abstract_batch(config, mesh, config.train.batch_size).items()
        }
        make = state_maker(config, make_optimizer(config))

    def train(held: list[State], steps: int) -> None:
        with jax.set_mesh(mesh):
            for _ in range(steps):
                held[0], metrics = program(held[0], batch)
            jax.block_until_ready((held[0], metrics))

    def begin() -> Callable[[int], None]:
        with jax.set_mesh(mesh):
            return partial(train, [make()])

    return begin
