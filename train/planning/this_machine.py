"""This machine, where a plan is for it: what its devices can do, and how long a step takes them."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train.config.config import Config
from train.devices.hardware import Chip, chip_of
from train.planning.compilation import abstract_batch
from train.step.flops import peak_flops
from train.step.optimizer import make_optimizer
from train.step.state import make_state

MOVED_BYTES = 2**28
STEPS, SECONDS = 10, 10.0


def chip_here(dtype: str) -> Chip:
    """A device of this machine; what is in no data sheet is measured, and shared by the devices of a CPU.

    Args:
        dtype: of the products that the peak is measured with, where it is.
    """
    device, sharing = jax.local_devices()[0], jax.local_device_count()
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
        memory_bytes=memory,
        memory_bandwidth=bandwidth,
        # Devices of a CPU send by copying: a byte is read and written.
        link_bandwidth=bandwidth / 2,
        network_bandwidth=bandwidth / 2,
        host_bandwidth=bandwidth / 2,
        max_devices=sharing,
    )


def memory_available() -> int:
    """Bytes of this machine's memory that nobody uses; where the system does not say: all of its memory."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_bandwidth() -> float:
    """Bytes/s that one device reads and writes, of an array larger than its caches."""
    with jax.set_mesh(Mesh(jax.local_devices()[:1], "x")):
        x = jnp.zeros(MOVED_BYTES // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1)
        add(x).block_until_ready()
        return 2 * MOVED_BYTES / min(_seconds(lambda: add(x).block_until_ready()) for _ in range(3))


def measured_step(config: Config, mesh: Mesh, executable: Any) -> float:
    """Seconds of a step on random tokens: the median of some, after one that is not counted.

    Args:
        config: resolved.
        mesh: of devices that are here.
        executable: the compiled step.
    """
    T, random = config.data.segment_length, np.random.default_rng(0)
    assert config.model.vocab_size
    tokens = random.integers(0, config.model.vocab_size, (config.train.batch_size, T + 1), dtype=np.int32)
    ones = np.ones_like(tokens[:, 1:])
    of_text: dict[str, np.ndarray] = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    of_text |= {"positions": ones * np.arange(T, dtype=np.int32), "segment_ids": ones, "loss_weights": ones}
    with jax.set_mesh(mesh):
        batch = {
            name: jax.device_put(of_text[name].astype(x.dtype), x.sharding)
            for name, x in abstract_batch(config, mesh).items()
        }
        state = make_state(config, make_optimizer(config))

        def step() -> None:
            nonlocal state
            state, metrics = executable(state, batch)
            jax.block_until_ready((state, metrics))

        step()
        seconds: list[float] = []
        while len(seconds) < STEPS and sum(seconds) < SECONDS:
            seconds.append(_seconds(step))
    return sorted(seconds)[len(seconds) // 2]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
