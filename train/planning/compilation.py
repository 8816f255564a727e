"""The training step of a run, compiled for local devices or for a topology, and cached for the next plan."""

import functools
import gzip
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from data.errors import InputError
from data.files.atomic import atomic_file
from train.config.config import ResolvedConfig
from train.devices.xla import compiler_options
from train.planning.operations import COUNTING_NAME
from train.planning.topology import without_jax_cache
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state
from train.step.step import abstract_batch, make_train_step

log = logging.getLogger("ziggurat")

COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Compilation:
    """A training step as the compiler returns it."""

    text: str  # the optimized program; empty if the compiler refused it
    memory: Mapping[str, int]  # bytes per device by the compiler's names: `argument`, `output`, `temp`, `peak`, …
    refused: str | None  # the compiler's message for a program that does not fit, or None
    lower_seconds: float  # time from Python to the compiler's input
    compile_seconds: float  # time of the compiler when it ran
    cached: bool = False
    executable: Any = field(default=None, compare=False)  # None if read from a cache, or if its devices are not local


def compile_step(config: ResolvedConfig, mesh: Mesh, cache: Path | None = None) -> Compilation:
    """Compiles the function that `pretrain` jits, for the full batch. Raises InputError if the compiler cannot make it.

    The cache is a folder for compiled programs of topologies. JAX's own persistent cache serves local devices only: it
    cannot read back a program without devices.
    """
    is_local = mesh.devices.flat[0] in jax.devices()
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        optimizer = make_optimizer(config)
        step: Any = make_train_step(config, optimizer)
        lowered = step.lower(abstract_state(config, optimizer), abstract_batch(config, mesh, config.train.batch_size))
        lowering = time.perf_counter() - start
        if is_local:
            hits = len(_cache_hits())
            compiled = _compiled(lowered, lowering)
            return replace(compiled, cached=len(_cache_hits()) > hits)
        file = cache / f"{_key(config, mesh, lowered)}.json.gz" if cache else None
        if file and (kept := _kept(file)):
            return replace(kept, lower_seconds=lowering, cached=True)
        with without_jax_cache():
            compiled = replace(_compiled(lowered, lowering), executable=None)
        if file:
            _keep(file, compiled)
        return compiled


def _compiled(lowered: jax.stages.Lowered, lower_seconds: float) -> Compilation:
    start = time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip().splitlines()[0]
        if "UNIMPLEMENTED" in message:
            raise InputError(
                f"the compiler cannot make this step: {message}; try another mesh, model.remat_policy or "
                "train.accumulation_steps"
            ) from None
        if "RESOURCE_EXHAUSTED" not in str(error) and "CompileTimeHbmOom" not in str(error):
            raise
        refused = message.removeprefix("RESOURCE_EXHAUSTED: ")
        return Compilation("", {}, refused, lower_seconds, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats: Any = executable.memory_analysis()
    suffix = "_size_in_bytes"
    memory = {name.removesuffix(suffix): getattr(stats, name) for name in dir(stats) if name.endswith(suffix)}
    memory["peak"] = stats.peak_memory_in_bytes
    return Compilation(executable.as_text() or "", memory, None, lower_seconds, seconds, executable=executable)


def _kept(file: Path) -> Compilation | None:
    """Reads the result of an earlier process, or returns None if there is none that can be read."""
    try:
        return Compilation(**json.loads(gzip.decompress(file.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        return None


def _keep(file: Path, compilation: Compilation) -> None:
    kept = {name: value for name, value in vars(compilation).items() if name not in ("executable", "cached")}
    try:
        with atomic_file(file) as partial:
            partial.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))
    except OSError as error:
        log.warning("the compiled program was not cached: %s", error)


def _key(config: ResolvedConfig, mesh: Mesh, lowered: jax.stages.Lowered) -> str:
    """Hashes everything that the compiled program depends on, and the names in it that a plan reads."""
    devices = [(device.device_kind, device.process_index, getattr(device, "coords", None),
                getattr(device, "slice_index", 0)) for device in mesh.devices.flat]  # fmt: skip
    versions = {name: _version(name) for name in COMPILERS}
    flags = [compiler_options(), *(os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))]
    names = sorted({name[0] for name in COUNTING_NAME.finditer(lowered.as_text(debug_info=True))})
    # The text omits the content of large constants, such as masks, which follows from the settings.
    program = [asdict(config.model), config.data.segment_length, dict(mesh.shape), lowered.as_text(), names]
    parts = [*program, devices, versions, flags]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _cache_hits() -> list[str]:
    """Returns a list that grows by one whenever JAX reads a program from its persistent cache."""
    hits: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    return hits
