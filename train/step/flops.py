"""Model FLOPs of a token, and the peak FLOP/s and memory use of the devices.

Model FLOPs of a token are 6 × the matrix parameters that it meets (a tied embedding counts once, as unembedding; of
experts those that a token goes through)
+ 12 × L × H × C × the keys that a position attends to on average (T/2, or fewer with a sliding window): forward and
backward, without recomputation (PaLM, Chowdhery et al. 2022, appendix B, halved for causality).
"""

import math
import resource
import sys
import timeit
from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.config import ResolvedModelConfig
from model.layers import layer_kinds
from model.parameters import active_elements, parameter_table
from train.devices.hardware import chip_of


def flops_per_token(config: ResolvedModelConfig, T: int) -> float:
    """Returns the model FLOPs of training on one token of a segment of T tokens (formula above)."""
    roles = ("matrix", "router", "gate", "unembedding")
    matrices = sum(active_elements(config, p) for p in parameter_table(config).values() if p.role in roles)
    if config.tie_embeddings:
        matrices += math.prod(parameter_table(config)["embedding.table"].shape)
    windows = [min(kind.window or T, T) for kind in layer_kinds(config)]
    keys = sum(window * (1 - window / (2 * T)) for window in windows)
    return 6 * matrices + 6 * config.num_heads * (config.head_dim + config.value_dim) * keys


def peak_flops(dtype: str) -> tuple[float, str]:
    """Returns (FLOP/s of all devices, source of the figure); a CPU is measured by one large matrix product."""
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.peak_flops * jax.device_count(), f"{kind} data sheet, dense bfloat16"
    n = 1024
    # The output is float32 as in `model.product`; for bfloat16 inputs that is also faster.
    seconds = least_seconds(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32), (n, n), dtype)
    # Virtual CPU devices share cores, all of which one product already uses.
    machines = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * n**3 / seconds * machines, f"a {n} × {n} {dtype} product measured here"


def least_seconds(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], dtype: str) -> float:
    """Measures a compiled function of an array of ones on the first local device; returns the least of three times."""
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], "x")):
        compiled = jax.jit(function)
        x = jnp.ones(shape, dtype)
        compiled(x).block_until_ready()
        return min(timeit.repeat(lambda: compiled(x).block_until_ready(), repeat=3, number=1))


def memory_bytes() -> int:
    """Returns the peak bytes in use on the fullest local device, or of the process if devices report none."""
    device_peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(device_peaks) or process_peak
