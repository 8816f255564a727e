"""The program `ziggurat`: prepares this process and runs a command. JAX is imported by the commands that need it."""

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import Fault, InputError, StorageError
from launch.commands import overview, parse
from launch.exit_status import report_error
from launch.library_errors import short_library_errors
from launch.version import ROOT, version

HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Names in Linux's /dev of NVIDIA's accelerators (dxg: under WSL), TPUs and AMD's.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "accel*", "vfio/[0-9]*", "kfd")
# `plan` times the step that `pretrain` will run.
RUNS_TRAINING_STEPS = ("pretrain", "plan")

log = logging.getLogger("ziggurat")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 done, 1 a fault, 2 the user's error, 75 stopped, 130 interrupted."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    if argv is None:
        argv = sys.argv[1:]
        prepare_process(argv)
    with short_library_errors():
        try:
            check_rooms()
            status = run_command(argv)
            # A failing last write is reported here and not as Python exits.
            sys.stdout.flush()
            return status
        except (InputError, Fault, StorageError, OSError, KeyboardInterrupt) as error:
            return report_error(error)


def run_command(argv: Sequence[str]) -> int:
    """Runs a command, or prints the version, or the commands where a line names none or only the beginning of some."""
    if argv and argv[0] == "--version":
        print(f"ziggurat {version()}")
        return 0
    words = [word for word in argv if word not in ("-h", "--help")]
    if len(words) <= 1 and (commands := overview(words)):
        print(f"usage: {' '.join(['ziggurat', *words])} COMMAND [-h] ...\n")
        if not words:
            print("Pretrain decoder-only language models on whatever devices there are.\n")
        print(commands)
        return 0 if len(words) < len(argv) else 2
    run, arguments = parse(argv)
    return run(arguments)


def check_rooms() -> None:
    """Raises InputError where another package hides one of this project's packages or its module `settings`."""
    files = {room: ROOT / room / "__init__.py" for room in ("model", "data", "train", "launch")}
    for name, file in (files | {"settings": ROOT / "settings.py"}).items():
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != file:
            raise InputError(f"the package {name!r} resolves to {origin}, not to {file}; use a venv of its own")


def prepare_process(argv: Sequence[str]) -> None:
    """On a Linux machine without an accelerator, sets the environment in which JAX runs well on CPUs.

    JAX would look for accelerators where the compilers for `ziggurat plan` are installed, and print why each of their
    plugins cannot start. Training steps are about a fifth faster with large memory pages; the C library reads this
    tunable only as a process starts, so the process replaces itself. A user's JAX_PLATFORMS or GLIBC_TUNABLES is kept.
    On every machine JAX computes with 32 bits, for which the programs are written.
    """
    os.environ["JAX_ENABLE_X64"] = "0"
    if sys.platform != "linux" or any(file for name in ACCELERATORS for file in Path("/dev").glob(name)):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if argv and argv[0] in RUNS_TRAINING_STEPS and "GLIBC_TUNABLES" not in os.environ:
        log.debug("restarting with GLIBC_TUNABLES=%s", HUGE_PAGES)
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
