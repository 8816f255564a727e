"""FLOPs of a token, and the peak of the devices."""

import math
import resource
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.parameters import parameter_table
from train.devices.hardware import chip_of


def flops_per_token(config: ModelConfig, T: int) -> float:
    """Model FLOPs of training on one token of a segment of T (see the module)."""
    matrices = sum(math.prod(p.shape) for p in parameter_table(config).values() if p.role in ("matrix", "unembedding"))
    if config.tie_embeddings:
        matrices += math.prod(parameter_table(config)["embedding.table"].shape)
    assert config.head_dim is not None
    window = min(config.sliding_window or T, T)
    keys = window * (1 - window / (2 * T))
    return 6 * matrices + 12 * config.num_layers * config.num_heads * config.head_dim * keys


def peak_flops(dtype: str) -> tuple[float, str]:
    """(FLOP/s of all devices, where the figure is from); a CPU's is measured by one large matrix product."""
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.peak_flops * jax.device_count(), f"{kind} data sheet, dense bfloat16"
    n = 1024
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], "x")):
        # As `model.product` does it: what leaves is float32, and in bfloat16 that is the faster way.
        product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
        x = jnp.ones((n, n), dtype)
        product(x, x).block_until_ready()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    # Virtual CPU devices share the cores that one product already uses.
    machines = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * n**3 / min(seconds) * machines, f"a {n} × {n} {dtype} product measured here"


def memory_bytes() -> int:
    """The most so far of the fullest of this process's devices; of the process itself, where they don't tell."""
    of_devices = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    # macOS counts in bytes, Linux in KiB.
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(of_devices) or of_process
