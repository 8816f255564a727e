"""Arguments that several commands share."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from data.errors import InputError
from data.files.writable import why_not_writable


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


def path(value: str) -> Path:
    """Argparse type of a path, which may begin with ~."""
    return Path(value).expanduser()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument `model`: a run, one of its checkpoints, or weights."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the flag --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def too_small(arguments: argparse.Namespace, least: Mapping[str, int]) -> list[str]:
    """Returns a problem for each of these flags whose number is below its least one."""
    given = {flag: getattr(arguments, flag.replace("-", "_")) for flag in least}
    wrong = [flag for flag, value in given.items() if value is not None and value < least[flag]]
    return [f"--{flag}={given[flag]} must be at least {least[flag]}" for flag in wrong]


def check_page(page: Path, flag: str, generator: str, kind: str) -> None:
    """Raises InputError where a page cannot be written, or would replace a file without the comment `generator`."""
    if problem := why_not_writable(page.parent):
        raise InputError(f"{flag}={page}: {problem}; name another path")
    if page.exists() and not (page.is_file() and generator in page.read_text(errors="replace")[:100]):
        raise InputError(f"{page} exists and is no {kind}; name another file with {flag}=FILE")
