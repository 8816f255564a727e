"""Check this machine for what Ziggurat needs: Python, packages, devices, processor, memory and disk.

Ends with status 1 where something that is needed is missing or broken, and names the command that installs it.
"""

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from data.files.writable import why_not_writable
from launch.columns import columns
from launch.version import ROOT, version

BROKEN = "BROKEN"
# Optional extra → (a distribution that it installs, its use).
EXTRAS = {
    "cuda": ("jax-cuda13-plugin", "NVIDIA GPUs"),
    "tpu": ("libtpu", "TPUs"),
    "plan": ("libtpu", "plans for TPUs (Linux)"),
    "plan-cuda": ("nvidia-cuda-nvcc", "plans for GPUs (Linux)"),
    "tensorboard": ("tensorboardX", "metrics in TensorBoard"),
    "wandb": ("wandb", "metrics in Weights & Biases"),
    "parquet": ("pyarrow", "Parquet files"),
    "zstd": ("backports.zstd", "zstd files before Python 3.14"),
    "s3": ("s3fs", "text in s3://"),
    "gcs": ("gcsfs", "text and checkpoints in gs://"),
    "http": ("aiohttp", "text at http:// and in hf://"),
    "gguf": ("gguf", "files for llama.cpp"),
    "tasks": ("lm-eval", "tasks of lm-evaluation-harness"),
}
# Flags in /proc/cpuinfo → names.
FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX bfloat16",
            "asimd": "NEON", "sve": "SVE", "bf16": "bfloat16"}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: `ziggurat doctor` has no flags."""


def run(arguments: argparse.Namespace) -> int:
    """Prints a table; returns 1 where something that is needed is broken."""
    rows = [*packages(), *machine(), devices()]
    print(columns([("", "ziggurat", f"{version()} in {ROOT}"), *rows]))
    optional = []
    for extra, (distribution, use) in EXTRAS.items():
        installed = installed_version(distribution)
        optional.append((extra, use, f"{distribution} {installed}" if installed else pip(f"[{extra}]")))
    print(f"\noptional\n{columns(optional)}")
    return int(any(status == BROKEN for status, _, _ in rows))


def packages() -> Iterator[tuple[str, str, str]]:
    """Yields (status, name, version and bounds) of Python and each required package."""
    try:
        needed = [text for text in metadata.requires("ziggurat") or [] if "extra ==" not in text]
        bounds = metadata.metadata("ziggurat")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield BROKEN, "packages", f"ziggurat is not installed: {pip('')}"
        return
    python = platform.python_version()
    yield "" if within(python, bounds) else BROKEN, "Python", f"{python} ({bounds})"
    for requirement in [*needed, "jaxlib"]:
        name, bounds = split_requirement(requirement)
        installed = installed_version(name)
        if installed is None:
            yield BROKEN, name, f"not installed: {pip('')}"
        elif not within(installed, bounds):
            yield BROKEN, name, f"{installed} is not {bounds}: {pip('')}"
        else:
            yield "", name, f"{installed} ({bounds})" if bounds else installed


def machine() -> Iterator[tuple[str, str, str]]:
    """Yields (status, name, text) of processor, memory and disks."""
    yield "", "processor", processor()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "", "memory", f"{total / 2**30:,.1f} GiB"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, folder in (("this folder", Path.cwd()), ("cache", cache)):
        if problem := why_not_writable(folder):
            yield BROKEN, name, f"{folder}: {problem}"
        else:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            yield "", name, f"{folder}: {shutil.disk_usage(existing).free / 1e9:,.1f} GB free"


def processor() -> str:
    """Returns the processor's name, its cores, and the features that make matrix products fast."""
    file = Path("/proc/cpuinfo")
    info = file.read_text() if file.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", info, re.M)
    has = set(flags[1].split()) if flags else set()
    features = [name for flag, name in FEATURES.items() if flag in has]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([model[1] if model else platform.machine(), f"{cores} cores", *features])


def devices() -> tuple[str, str, str]:
    """Returns (status, name, text) of the devices that JAX finds."""
    try:
        import jax

        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:  # a plugin may fail in any way
        return BROKEN, "devices", f"JAX cannot start: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return "", "devices", f"{counts} (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')})"


def split_requirement(requirement: str) -> tuple[str, str]:
    """Returns (distribution, bounds) of a requirement, as in ("jax", ">=0.10.2,<0.13")."""
    parts = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?([^;]*).*", requirement)
    assert parts is not None
    return parts[1], parts[2].strip()


def within(version: str, bounds: str) -> bool:
    """True where a version is inside bounds such as ">=0.10.2,<0.13"; only >= and < are understood."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)][:3]

    lower = [numbers(bound) for bound in bounds.split(",") if bound.startswith(">=")]
    upper = [numbers(bound) for bound in bounds.split(",") if bound.startswith("<")]
    return all(numbers(version) >= bound for bound in lower) and all(numbers(version) < bound for bound in upper)


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pip(extra: str) -> str:
    """Returns the command that installs Ziggurat's packages, or those of an extra."""
    return f"{sys.executable} -m pip install -e '{ROOT}{extra}'"
