"""The program `ziggurat`: prepares this process and runs a command. JAX is imported by the commands that need it."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from data.errors import InputError
from launch.exit_status import finish_output, report_error
from launch.library_errors import short_library_errors
from launch.memory import LONG_RUN, SHORT_RUN, start_again
from launch.program_cache import keep_programs
from launch.streams import ShownFormatter, insistent_interrupts, prepare_streams

# Names in Linux's /dev of NVIDIA's accelerators (dxg: under WSL), TPUs and AMD's.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "accel*", "vfio/[0-9]*", "kfd")
# glibc's memory settings by command. `plan` times the step of a long run; a prefill is a forward pass.
MEMORY = {"pretrain": SHORT_RUN, "compare": SHORT_RUN, "plan": LONG_RUN, "generate": LONG_RUN, "chat": LONG_RUN}
WITHOUT_JAX = ("presets", "completion", "launch", "report")

log = logging.getLogger("ziggurat")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 done, 1 a fault, 2 the user's error, 75 stopped, 130 interrupted."""
    is_process = argv is None
    words = sys.argv[1:] if argv is None else argv
    try:
        with insistent_interrupts() if is_process else nullcontext(), short_library_errors():
            if is_process:
                prepare_process(words)
                prepare_streams()
            handler = logging.StreamHandler()
            handler.setFormatter(ShownFormatter("%(message)s"))
            logging.basicConfig(handlers=[handler])
            log.setLevel(logging.INFO)
            check_rooms()
            status = run_command(words)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        status = report_error(error)
    return finish_output(status)


def run_command(argv: Sequence[str]) -> int:
    """Runs a command, or prints the version, or the commands where a line names none or only the beginning of some."""
    from launch.commands import overview, parse
    from launch.environment import check_environment
    from launch.version import version

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
    try:
        run, arguments = parse(argv)
    except SystemExit:  # of argparse, after --help
        return 0
    if argv[0] not in WITHOUT_JAX:
        check_environment()
    return run(arguments)


def check_rooms() -> None:
    """Raises InputError where another package hides one of this project's packages or its module `settings`."""
    import importlib.util

    from launch.version import ROOT

    files = {room: ROOT / room / "__init__.py" for room in ("model", "data", "train", "launch")}
    for name, file in (files | {"settings": ROOT / "settings.py"}).items():
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != file:
            raise InputError(f"the package {name!r} resolves to {origin}, not to {file}; use a venv of its own")


def prepare_process(argv: Sequence[str]) -> None:
    """Starts this process again with UTF-8 for all files, and on a machine without accelerators as JAX runs well there.

    JAX would look for accelerators where the compilers for `ziggurat plan` are installed, and print why each of their
    plugins cannot start. Training steps are a third faster with `MEMORY`. A user's JAX_PLATFORMS or GLIBC_TUNABLES is
    kept.
    On every machine JAX computes with 32 bits, for which the programs are written, and keeps compiled programs.
    """
    os.environ["JAX_ENABLE_X64"] = "0"
    # Processes that `launch local` starts decide for themselves.
    if argv and argv[0] not in WITHOUT_JAX:
        keep_programs(os.environ)
    # Python takes the encoding of files from the locale, and reads this option only as it starts.
    options = [] if sys.getfilesystemencoding() == "utf-8" else ["-X", "utf8"]
    memory = None
    if sys.platform == "linux" and not any(file for name in ACCELERATORS for file in Path("/dev").glob(name)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if argv and "GLIBC_TUNABLES" not in os.environ:
            memory = MEMORY.get(argv[0])
    if memory or options:
        start_again(memory, options)


if __name__ == "__main__":
    sys.exit(main())
