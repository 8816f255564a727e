"""Arguments that several commands share."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from data.errors import InputError
from data.files.writable import why_not_writable
from data.printable import name_problem


def text(value: str) -> str:
    """Argparse type of a text. A shell's bytes that are no UTF-8 reach Python as lone surrogates, which are refused."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not valid UTF-8") from None
    return value


def prompt(value: str) -> str:
    """Argparse type of a text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("empty; give some text")
    return text(value)


def one_line(value: str) -> str:
    """Argparse type of a name, one line that is not empty. A ~ at its beginning is the home folder."""
    if problem := name_problem(value):
        raise argparse.ArgumentTypeError(problem)
    return os.path.expanduser(value)


def path(value: str) -> Path:
    """Argparse type of a path, which may begin with ~. It may lead to nothing, but not over links that do."""
    where = Path(one_line(value))
    try:
        where.stat()
    except (FileNotFoundError, NotADirectoryError):
        if where.is_symlink():
            raise argparse.ArgumentTypeError(f"{where} is a link to nothing; name another path") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{where}: {error.strerror}; name another path") from None
    return where


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument `model`: a run, one of its checkpoints, or weights."""
    parser.add_argument(
        "model", type=one_line, metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def too_small(arguments: argparse.Namespace, least: Mapping[str, int]) -> list[str]:
    """Returns a problem for each of these flags whose number is below its least one."""
    given = {flag: getattr(arguments, flag.replace("-", "_")) for flag in least}
    wrong = [flag for flag, value in given.items() if value is not None and value < least[flag]]
    return [f"--{flag}={given[flag]} must be at least {least[flag]}" for flag in wrong]


def check_output(file: Path, flag: str, generator: str, kind: str) -> None:
    """Raises InputError where a file cannot be written, or would replace one without the comment `generator`."""
    if problem := why_not_writable(file.parent):
        raise InputError(f"{flag}={file}: {problem}; name another path")
    if os.path.lexists(file) and not (file.is_file() and generator.encode() in first_bytes(file)):
        raise InputError(f"{file} exists and is no {kind}; name another file with {flag}=FILE")


def first_bytes(file: Path) -> bytes:
    """Returns the beginning of a file, where the commands that may replace it have left their sign."""
    with file.open("rb") as stream:
        return stream.read(200)
