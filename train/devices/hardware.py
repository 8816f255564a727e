"""Figures of accelerators: from their makers' data sheets, and from the compilers."""

import os
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, which is one device of JAX; or half of one whose two dies are a device each."""

    name: str  # the name in `--topology`
    device_kinds: tuple[str, ...]  # JAX's names of the device
    platform: str  # tpu, gpu or cpu
    peak_flops: float  # FLOP/s of dense products in bfloat16
    matmul_dtypes: tuple[str, ...]  # the values of `model.matmul_dtype` whose products are faster
    eight_bit_flops: float  # FLOP/s of their dense products, or 0 without any
    memory_bytes: int  # the memory that the compiler lets a program use on a TPU; otherwise all memory of the device
    memory_bandwidth: float  # bytes/s, from the data sheet
    # Bytes/s that a device can send to others of its slice or host. For a TPU, along one dimension of the torus that
    # closes to a ring, in both directions, by all devices of a chip together; for a GPU, over all its NVLinks.
    link_bandwidth: float
    network_bandwidth: float  # bytes/s that a device can send to other slices or hosts
    host_bandwidth: float  # bytes/s between the device and its host's memory, one way
    cycles_per_second: float = 0.0  # rate of the `estimated_cycles` that the TPU compiler writes, or 0 without any
    full_ring: int = 0  # multiples of this length close a torus dimension to a ring; 0 without a torus
    max_devices: int = 8  # the most chips that a slice has, or GPUs that a host has
    vector_units: int = 0  # operations of a cycle outside a TPU's matrix units: 4 × 8 × 128 on each core
    die_bandwidth: float = 0.0  # bytes/s that a device can send to the other one of its chip, or 0 if it is the chip

    @property
    def devices(self) -> int:
        """Number of devices that the chip is to JAX."""
        return 2 if self.die_bandwidth else 1

    def product_seconds(self, flops: float, eight_bit_flops: float = 0.0) -> float:
        """Returns the least seconds of dense products, of whose FLOPs some have operands of 8 bits."""
        rate = self.eight_bit_flops or self.peak_flops
        return (flops - eight_bit_flops) / self.peak_flops + eight_bit_flops / rate


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in 2026.
# - Links: given for all of a chip and both directions (400 GB/s for the 4 of v5e, 1,200 for the 6 of v5p, 800 for the 4
#   of v6e): a ring uses two, sending on each half of that. v4's 6 links carry 50 GB/s each way (Jouppi et al. 2023,
#   arXiv:2304.01433).
# - Network: a host's cards shared by its chips (v5e 2 × 100 Gbit/s for 8, v6e 4 × 200 for 8), v5p 50 Gbit/s a chip;
#   v4's is in no data sheet, assumed to be v5p's. Host: Austin et al. 2025, How to Scale Your Model, part 2.
# - Memory: what the compiler reports if a program is too large (libtpu 0.0.50), a little less than the data sheet's.
# - Cycles: peak / FLOPs of a cycle, 2 × 128² on each of 4 matrix units a core (v6e: 2 × 256² × 2 rows on each of 2). Of
#   large products the compiler's cycles then come to 91 to 98% of peak at best.
# - TPU7x (…/tpu7x, read in 2026) has two dies a chip, each a device with half of the figures; only the links
#   are the chip's. A die sends to the other six times what a link carries one way. Its clock is in no data sheet, but
#   follows from the peak and matrix units as a v6e's (jax/_src/tpu_info.py has 2). Host: PCIe 5 × 16 for a chip.
# GPU: NVIDIA's data sheets of the SXM boards, and of a DGX of 8 that has a card of 200 (A100) or 400 Gbit/s for each.
# NVLink is given for both directions (600, 900, 1,800 GB/s). Memory: XLA's xla/backends/gpu/target_config/specs.
# fmt: off
_TABLE = (
    # name, JAX's names, FLOP/s, memory, its bytes/s, links, network, host; TPU: cycles/s, full ring, slice, vector, die
    ("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1200e9, 100e9, 6.25e9, 16e9, 1.05e9, 4, 4096, 8192),
    ("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 100e9, 3.125e9, 16e9, 1.5e9, 16, 256, 4096),
    ("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.73 * GIB), 2765e9, 200e9, 6.25e9, 16e9, 1.75e9, 4, 6144, 8192),
    ("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.24 * GIB), 1638e9, 200e9, 12.5e9, 32e9, 1.75e9, 16, 256, 4096),
    ("tpu7x", ("TPU7x",), 1153.5e12, int(94.74 * GIB), 3690e9, 200e9, 6.25e9, 32e9, 2.2e9, 4, 9216, 4096, 600e9),
    ("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 85_100_068_864, 2039e9, 300e9, 25e9, 32e9),
    ("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 84_942_979_072, 3352e9, 450e9, 50e9, 64e9),
    ("h200", ("NVIDIA H200",), 989e12, 151_397_597_184, 4800e9, 450e9, 50e9, 64e9),
    ("b200", ("NVIDIA B200",), 2250e12, 191_514_411_008, 7672e9, 900e9, 50e9, 64e9),
)
# fmt: on
# Faster dtypes and FLOP/s of their dense products, from the same sheets. A v4 multiplies int8 as fast as bfloat16, and
# a TPU7x not at all.
_BOTH = ("float8", "int8")
_EIGHT_BITS = {
    "v5e": (("int8",), 394e12),
    "v5p": (("int8",), 918e12),
    "v6e": (("int8",), 1836e12),
    "tpu7x": (("float8",), 2307e12),
    "a100": (("int8",), 624e12),
    "h100": (_BOTH, 1979e12),
    "h200": (_BOTH, 1979e12),
    "b200": (_BOTH, 4500e12),
}


def _chip(name: str, kinds: tuple[str, ...], peak_flops: float, *figures: Any) -> Chip:
    platform = "tpu" if len(figures) > 5 else "gpu"
    return Chip(name, kinds, platform, peak_flops, *_EIGHT_BITS.get(name, ((), 0.0)), *figures)


CHIPS = {row[0]: _chip(*row) for row in _TABLE}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip with this name of JAX's, or None if there are no figures for it."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def with_usable_memory(chip: Chip) -> Chip:
    """Returns the chip with the memory that JAX lets a program use: of a GPU three quarters by default."""
    if chip.platform != "gpu":
        return chip
    part = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    return replace(chip, memory_bytes=int(chip.memory_bytes * float(part)))
