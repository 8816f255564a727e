"""Runs the commands that README.md and docs/*.md show, and puts their real output into the pages.

    python docs/outputs.py                    # the quick blocks of all pages
    python docs/outputs.py docs/weights.md    # those of some pages
    python docs/outputs.py --all              # the slow ones too: this trains models, for some hours

A fenced block with commands has a mark on the line before its fence:

    <!-- output -->                      quick: run each time
    <!-- cached 2026-11-26 0.7.0 -->     slow: run with --all, which renews the date and the version
    <!-- recorded 2026-11-26 0.7.0 -->   never run: it needs another machine, or a hand that kills a process

In such a block a line that begins with `$ ` is a command, which continues after a backslash or in lines that begin with
`> `. The lines below it are its output. A line `...` cuts the output: the same number of lines stays before and after.
`<!-- before COMMAND -->` runs a command, which the page does not show, before the next block. All commands run in the
order of the pages, in one scratch folder. It begins with the files of docs/scratch; pages show it as /home/me/project.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SHOWN_FOLDER = "/home/me/project"
MARK = re.compile(
    r"<!-- (?:(?P<quick>output)|(?P<slow>cached|recorded) (?P<date>\d{4}-\d\d-\d\d) (?P<version>\S+)"
    r"|before (?P<hidden>.+)) -->"
)
CUT = "..."


class Call(NamedTuple):
    """A command as the page shows it, and the output below it."""

    shown: list[str]
    output: list[str]

    @property
    def command(self) -> str:
        """The command as a shell takes it."""
        return "\n".join([self.shown[0].removeprefix("$ "), *(line.removeprefix("> ") for line in self.shown[1:])])


class Block(NamedTuple):
    """A marked block of a page: its content is the lines `start` to `stop`, its hidden commands run before it."""

    mark: re.Match[str]
    start: int
    stop: int
    hidden: list[str]
    calls: list[Call]


def pages() -> list[Path]:
    """README.md first, since other pages use the runs that it makes."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(lines: Sequence[str]) -> Iterator[Block]:
    """Yields the marked blocks of a page in order."""
    hidden: list[str] = []
    for number, line in enumerate(lines):
        if not (mark := MARK.fullmatch(line)):
            continue
        if mark["hidden"]:
            hidden.append(mark["hidden"])
            continue
        start = number + 2
        stop = next(i for i in range(start, len(lines)) if lines[i].startswith("```"))
        yield Block(mark, start, stop, hidden, list(calls(lines[start:stop])))
        hidden = []


def calls(lines: Sequence[str]) -> Iterator[Call]:
    """Splits a block's content into its commands."""
    call = Call([], [])
    for line in lines:
        continues = bool(call.shown) and not call.output and (call.shown[-1].endswith("\\") or line.startswith("> "))
        if continues:
            call.shown.append(line)
        elif line.startswith("$ "):
            if call.shown:
                yield call
            call = Call([line], [])
        else:
            call.output.append(line)
    yield call


def run(command: str, folder: Path) -> list[str]:
    """Runs a command in the scratch folder; returns the lines of its output and its errors together."""
    print(f"  {command}", file=sys.stderr, flush=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text = done.stdout.replace(sys.prefix, f"{SHOWN_FOLDER}/.venv")
    for place in (folder, ROOT):
        text = text.replace(str(place), SHOWN_FOLDER)
    return [line.rstrip() for line in text.rstrip("\n").splitlines()]


def cut(output: Sequence[str], old: Sequence[str]) -> list[str]:
    """Shortens an output where the old one was cut: the same number of lines stay before and after the cut."""
    if CUT not in old:
        return list(output)
    head = old.index(CUT)
    tail = len(old) - head - 1
    if len(output) <= head + tail:
        return list(output)
    return [*output[:head], CUT, *output[len(output) - tail :]]


def renewed(text: str, folder: Path, slow: bool) -> str:
    """Returns a page's text with fresh outputs."""
    lines = text.split("\n")
    parts: list[str] = []
    copied = 0
    for block in blocks(lines):
        if block.mark["slow"] and not (slow and block.mark["slow"] == "cached"):
            continue
        for command in block.hidden:
            run(command, folder)
        parts += lines[copied : block.start]
        if block.mark["slow"]:
            parts[-2] = f"<!-- cached {datetime.now(UTC).date()} {version()} -->"
        for call in block.calls:
            parts += [*call.shown, *cut(run(call.command, folder), call.output)]
        copied = block.stop
    return "\n".join([*parts, *lines[copied:]])


def version() -> str:
    """Returns the version of this checkout."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def main() -> None:
    """Rewrites the pages that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="pages to renew [all]")
    parser.add_argument("--all", action="store_true", help="run the slow commands too")
    parser.add_argument("--scratch", type=Path, help="folder that the commands run in and that stays [a temporary one]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.scratch or Path(temporary)).resolve()
        shutil.copytree(ROOT / "docs" / "scratch", folder, dirs_exist_ok=True)
        for page in arguments.files or pages():
            print(page, file=sys.stderr)
            page.write_text(renewed(page.read_text(), folder, arguments.all))


if __name__ == "__main__":
    main()
