"""The folder in which JAX and `ziggurat plan` keep compiled programs for later starts.

JAX's key of a program covers the processor's features (its fingerprint of the topology), XLA_FLAGS and the version of
jaxlib, so that different machines can share a home.
"""

import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

MOST_BYTES = 2**29
# Seconds of compiling from which a program is kept: of tiny's 16 programs 12, which are one megabyte.
LEAST_SECONDS = "0.1"
# A launcher sets one of these to the number of processes that it starts.
PROCESS_COUNTS = ("ZIGGURAT_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS")


def cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Returns JAX_COMPILATION_CACHE_DIR, or else a folder in the user's cache; None where there is no home."""
    if folder := environment.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(folder)
    cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache, "ziggurat")


def keep_programs(environment: MutableMapping[str, str]) -> None:
    """Makes JAX, which is not imported yet, keep the programs that it compiles; removes the oldest above MOST_BYTES.

    A user's JAX_COMPILATION_CACHE_DIR is left as it is; an empty one switches this off, as
    JAX_ENABLE_COMPILATION_CACHE=false does. Nothing is kept where the folder is not this user's own (what it holds is
    run) or cannot be written to, nor by one of several processes: JAX lets only the first write. On GPUs the others,
    compiling, would wait for its part in the choice of kernels.
    """
    folder = cache_folder(environment)
    is_one_of_several = any(environment.get(name, "1") != "1" for name in PROCESS_COUNTS)
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in environment or is_one_of_several or not is_ours(folder):
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
    remove_oldest(folder, MOST_BYTES)


def is_ours(folder: Path) -> bool:
    """True if a folder is this user's own and writable, or would be made in one that is."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return os.path.isdir(existing) and os.stat(existing).st_uid == os.getuid() and os.access(existing, os.W_OK)


def remove_oldest(folder: Path, most_bytes: int) -> None:
    """Removes the files of a folder that were read or written longest ago, until it has at most `most_bytes`.

    Also removes empty files, which a process that was killed leaves: JAX would warn of one at each start.
    """
    files = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # another process has removed it
                stat = entry.stat(follow_symlinks=False)
                files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    size = sum(file[1] for file in files)
    for _, file_size, path in sorted(files):
        if size > most_bytes or not file_size:
            with suppress(OSError):
                os.remove(path)
                size -= file_size
