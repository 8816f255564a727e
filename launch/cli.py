"""The one command, `ziggurat COMMAND`. Nothing heavy is imported before a command runs."""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.errors import Fault, InputError, StorageError
from launch.exit_status import report

# Command → (its module, one line of help).
COMMANDS = {
    "tokenize": ("launch.train_tokenizer", "train a tokenizer on a corpus"),
    "pretrain": ("launch.pretrain", "train a model, or go on with its run"),
    "evaluate": ("launch.evaluate", "loss and bits per byte on held-out documents or another corpus, and tasks"),
    "inspect data": ("launch.inspect_data", "which documents a step's batch is made of, or what a corpus holds"),
    "inspect loss": ("launch.inspect_loss", "what the model predicts at each position of a text"),
    "inspect attention": ("launch.inspect_attention", "one HTML page of each head's attention over a text"),
    "inspect embedding": ("launch.inspect_embedding", "which tokens' embeddings are nearest to a word's"),
    "plan": ("launch.plan", "memory, speed, days and cost of a run, on this machine or on one that is not here"),
    "report": ("launch.report", "one HTML page of a run: what was measured, what happened, where its time went"),
    "generate": ("launch.generate", "continue a prompt"),
    "export": ("launch.export", "write a run's weights for inference elsewhere"),
    "import": ("launch.import_weights", "take weights from elsewhere as a run"),
    "launch local": ("launch.local", "run a command as several processes on this machine"),
    "launch slurm": ("launch.slurm", "pretrain on a Slurm cluster"),
    "launch kubernetes": ("launch.kubernetes", "write the manifest that pretrains on a Kubernetes cluster"),
}
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# What Linux has in /dev for NVIDIA's accelerators (dxg: under WSL), TPUs and AMD's.
ACCELERATORS = ("nvidia[0-9]*", "dxg", "accel*", "vfio/[0-9]*", "kfd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 a fault, 2 the user's error, 75 stopped, 130 interrupted."""
    if argv is None:
        without_absent_accelerators()
        with_huge_pages()
        argv = sys.argv[1:]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ziggurat").setLevel(logging.INFO)
    try:
        check_rooms()
        run, arguments = parse(argv)
        return run(arguments)
    except (InputError, Fault, StorageError, OSError, KeyboardInterrupt) as error:
        return report(error)


def parse(argv: Sequence[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """The function that runs a command, and what it takes."""
    name, rest = find_command(argv)
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        f"ziggurat {name}",
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(rest)
    add_unknown(arguments, unknown)
    return module.run, arguments


def find_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its arguments); prints the help where it is asked for. InputError where there is no such command."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(
            "usage: ziggurat COMMAND [-h] ...\n\nPretrain decoder-only language models on whatever devices there are.\n"
        )
        print("\n".join(f"  {name:{width}}  {help}" for name, (_, help) in COMMANDS.items()))
        raise SystemExit(0 if argv else 2)
    for words in (1, 2):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, list(argv[words:])
    raise InputError(f"{argv[0]}: there is no such command; there are {', '.join(COMMANDS)}")


def add_unknown(arguments: argparse.Namespace, unknown: Sequence[str]) -> None:
    """Fields that do not exist go with the other overrides, to be reported with all that is wrong with the config."""
    for flag in unknown:
        name, given, value = flag.partition("=")
        if not (hasattr(arguments, "overrides") and name.startswith("--config.") and given):
            raise InputError(f"{flag}: there is no such flag; see --help")
        arguments.overrides[name.removeprefix("--config.")] = value


def check_rooms() -> None:
    """InputError where another package hides one of this project's four folders."""
    root = Path(__file__).resolve().parent.parent
    for room in ("model", "data", "train", "launch"):
        spec = importlib.util.find_spec(room)
        where = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if where != root / room:
            raise InputError(f"the package {room!r} resolves to {where}, not to {root / room}; use a venv of its own")


def without_absent_accelerators() -> None:
    """On a Linux machine with no accelerator, let JAX look for none.

    Where the compilers for `ziggurat plan` are installed it would find their plugins, and print why each cannot start.
    A JAX_PLATFORMS of the user's own is left alone.
    """
    if sys.platform == "linux" and not any(file for name in ACCELERATORS for file in Path("/dev").glob(name)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def with_huge_pages() -> None:
    """On Linux, start this process again with large memory pages: a CPU's training step is about a fifth faster.

    The C library reads its tunables only as a process starts. A GLIBC_TUNABLES of the user's own is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
