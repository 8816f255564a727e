"""Devices of a TPU slice or a GPU cluster that is not attached, for compilation alone.

The TPU compiler is the package libtpu, and the GPU compiler JAX's CUDA plugin with NVIDIA's assembler: neither needs a
device.
"""

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from data.errors import InputError
from train.config.values import nearest
from train.devices.hardware import CHIPS, Chip

# A small and a large shape of each chip in messages; GPUs are in hosts × GPUs of each.
EXAMPLES = {
    "v4": ("2x2x1", "4x4x8"),
    "v5e": ("2x2", "16x16"),
    "v5p": ("2x2x1", "8x8x8"),
    "v6e": ("2x2", "16x16"),
    "tpu7x": ("2x2x1", "8x8x8"),
}
# Environment that libtpu needs without a TPU, and with other processes that load it.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
# Figures of a GPU that the CUDA compiler needs, from XLA's xla/backends/gpu/target_config/specs: multiprocessors, units
# of each, shared memory of each and of a block (bytes), second-level cache (bytes), clock (GHz), capability.
GPU_FIGURES = ("cores", "units", "shared", "shared_of_block", "cache", "clock", "major", "extension")
GPUS = {
    "a100": (108, 64, 167_936, 166_912, 41_943_040, 1.41, 8, "NONE"),
    "h100": (132, 128, 233_472, 232_448, 52_428_800, 1.98, 9, "ACCELERATED_FEATURES"),
    "h200": (132, 128, 233_472, 232_448, 52_428_800, 1.98, 9, "ACCELERATED_FEATURES"),
    "b200": (148, 128, 233_472, 232_448, 132_644_864, 1.965, 10, "ACCELERATED_FEATURES"),
}
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_of_block}
  l2_cache_size: {cache} memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{kind}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
"""


def topology_devices(text: str, slices: int = 1) -> list[Any]:
    """Returns the devices of TPU slices or of a GPU cluster, for compilation alone.

    Raises InputError within seconds if the chip is unknown, the shape does not exist, or a compiler is not installed.

    Args:
        text: CHIP:SHAPE, as in `v5e:16x16` (the chips of a slice) or `h100:16x8` (hosts × GPUs of each).
        slices: number of TPU slices of this shape.
    """
    chip, shape = parse_topology(text, slices)
    return _tpus(text, chip, shape, slices) if chip.platform == "tpu" else _gpus(text, chip, shape)


def parse_topology(text: str, slices: int = 1) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the shape that a topology text names. Raises InputError if they do not exist."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        known = ", ".join(CHIPS)
        raise InputError(f"--topology={text}: unknown chip {name!r}; known are {known}{nearest(name, list(CHIPS))}")
    chip = CHIPS[name]
    small, large = EXAMPLES.get(name, ("1x8", "16x8"))
    examples = f"{name}:{small} or {name}:{large}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise InputError(f"--topology={text}: {shape!r} is not a shape; give one as in {examples}")
    sizes = tuple(map(int, shape.split("x")))
    dimensions = _dimensions(chip)
    if len(sizes) != dimensions:
        form = f"{dimensions} dimensions" if chip.platform == "tpu" else "hosts × GPUs of each"
        raise InputError(f"--topology={text}: the shape of {name} has {form}, as in {examples}")
    if slices < 1:
        raise InputError(f"--slices={slices}: give at least 1")
    if chip.platform == "gpu":
        if slices > 1:
            raise InputError(
                f"--slices={slices}: only TPUs have slices; for GPUs give more hosts, as in "
                f"--topology={name}:{slices * sizes[0]}x{sizes[1]}"
            )
        if sizes[1] > chip.max_devices:
            raise InputError(
                f"--topology={text}: a host has at most {chip.max_devices} GPUs; give hosts × GPUs, as in {examples}"
            )
        return chip, sizes
    if math.prod(sizes) > chip.max_devices:
        wanted = math.ceil(math.prod(sizes) / math.prod(map(int, large.split("x"))))
        raise InputError(
            f"--topology={text}: a slice of {name} has at most {chip.max_devices} chips; give several, as in "
            f"--topology={name}:{large} --slices={wanted}"
        )
    # A host has 2 × 2 chips of a slice; a v5e or v6e also comes alone.
    if any(size % 2 for size in sizes[:2]) and not (dimensions == 2 and sizes == (1, 1)):
        raise InputError(
            f"--topology={text}: hosts have 2 × 2 chips, so the first two sizes are even, as in {examples}"
        )
    return chip, sizes


def bandwidth_over(mesh: Mesh, axes: Collection[str], chip: Chip) -> float:
    """Returns the bytes/s that each device can send along these mesh axes while all send at once.

    Collectives run as rings (Thakur et al. 2005; Chan et al. 2007). In a slice, every dimension of the torus that the
    axes span adds its links, both ways round if the ends are linked and one way if not; a dimension taken with gaps
    shares its links with the groups in the gaps. Of a chip that is two devices, the two of one group are neighbours in
    its rings, which leave the chip once; those of different groups share its links. Axes that span slices or hosts
    share the network cards of a slice or host, and the slower of both ways counts. Latency is ignored.
    """
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.atleast_1d(mesh.devices[index]).ravel().tolist()
    place = lambda device: getattr(device, "slice_index", 0) if chip.platform == "tpu" else device.process_index
    inner = [device for device in group if place(device) == place(group[0])]
    within = math.inf
    if len(inner) > 1:
        within = _within_slice(inner, mesh, chip) if chip.full_ring else chip.link_bandwidth
    return min(within, chip.network_bandwidth * len(inner)) if len(inner) < len(group) else within


@contextmanager
def without_jax_cache() -> Iterator[None]:
    """Keeps programs of a topology out of JAX's persistent cache, which could not read them back.

    (JAX 0.10.2 and 0.12.0.1: "PjRtCompiler must be constructed with a Client".)
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            yield
    finally:
        jax.config.update(name, before)


def _within_slice(group: list[Any], mesh: Mesh, chip: Chip) -> float:
    chips = len({tuple(device.coords) for device in group})
    if chips == 1:
        return chip.die_bandwidth
    total = 0.0
    extents = [max(places) + 1 for places in zip(*(device.coords for device in mesh.devices.flat), strict=True)]
    closed = _closed(chip, extents)
    for dimension in range(_dimensions(chip)):
        mine = sorted({device.coords[dimension] for device in group})
        if len(mine) > 1:
            stride = (mine[-1] - mine[0]) / (len(mine) - 1)
            is_ring = closed[dimension] and stride * len(mine) == extents[dimension]
            total += chip.link_bandwidth * (1 if is_ring else 0.5) / stride
    return total * len(group) / chips / chip.devices


def _dimensions(chip: Chip) -> int:
    return EXAMPLES.get(chip.name, ("1x8",))[0].count("x") + 1


def _closed(chip: Chip, sizes: Sequence[int]) -> list[bool]:
    """Returns for each of three dimensions whether its ends are linked.

    In two dimensions those of full length are; in three all are, or none, as optical switches link whole cubes.
    """
    full = [size % chip.full_ring == 0 for size in sizes[: _dimensions(chip)]]
    return [all(full)] * 3 if len(full) == 3 else [*full, False]


def _tpus(text: str, chip: Chip, shape: tuple[int, ...], slices: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={text}: the TPU compiler is not installed; it is for Linux: pip install -e '.[plan]'"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    # Without its rings the compiler would gather over a whole slice by sums of zeros.
    settings: dict[str, Any] = {"wrap": _closed(chip, shape)} | ({"num_slices": slices} if slices > 1 else {})
    if math.prod(shape) == 1:
        settings["chips_per_host_bounds"] = [1, 1, 1]
    if chip.name == "v4":
        # JAX has both cores of a chip as one device.
        settings["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(text, "tpu", **settings)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        small, large = EXAMPLES[chip.name]
        raise InputError(
            f"--topology={text}: the TPU compiler says: {reason}; try {chip.name}:{small} or {chip.name}:{large}"
        ) from None
    return list(topology.devices)


def _gpus(text: str, chip: Chip, shape: tuple[int, ...]) -> list[Any]:
    figures: dict[str, Any] = dict(zip(GPU_FIGURES, GPUS[chip.name], strict=True))
    figures |= {"kind": chip.device_kinds[0], "memory": chip.memory_bytes, "bandwidth": chip.memory_bandwidth}
    settings = {"target_config": GPU_CONFIG.format(**figures), "topology": f"1x{shape[0]}x{shape[1]}"}
    try:
        devices = list(topologies.get_topology_desc("", "cuda", **settings).devices)
    except NotImplementedError:
        raise InputError(
            f"--topology={text}: JAX's CUDA plugin is not installed, or is not of JAX {jax.__version__}; "
            "it is for Linux: pip install -e '.[plan-cuda]'"
        ) from None
    _try_gpu_compiler(text, devices[0])
    return devices


def _try_gpu_compiler(text: str, device: Any) -> None:
    """Raises InputError if a part of the GPU compiler is missing; a large step would fail only after minutes."""
    x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16, sharding=SingleDeviceSharding(device))

    def probe(x: jax.Array) -> jax.Array:
        return jnp.sin(jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn"))

    try:
        with without_jax_cache():
            jax.jit(probe).lower(x).compile()
    except (RuntimeError, ValueError) as error:
        parts = {"ptxas": "NVIDIA's assembler ptxas", "libdevice": "NVIDIA's libdevice", "cuDNN": "cuDNN"}
        missing = [part for word, part in parts.items() if word in str(error)]
        if not missing:
            raise
        raise InputError(
            f"--topology={text}: {missing[0]} is not installed, which the GPU compiler needs: "
            "pip install -e '.[plan-cuda]'"
        ) from None
