"""One HTML page of a run, at any moment of it: how it stands, what was measured, what happened, where its time went."""

import argparse
from pathlib import Path

from data.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat report`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the page goes [RUN/report.html]")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; its path goes to standard output."""
    from launch.page.report_page import GENERATOR, make_page
    from train.run.folder import Run
    from train.run.storage import write_atomically

    folder = arguments.run_folder.expanduser()
    Run(folder).check_not_imported()
    page = make_page(Run(folder))
    output = arguments.output.expanduser() if arguments.output else folder / "report.html"
    check_output(output, "--output", GENERATOR, "report")
    write_atomically(output, page)
    print(output)
    return 0


def check_output(output: Path, flag: str, generator: str, kind: str) -> None:
    """InputError where a page cannot go to this file, or would replace what is no such page."""
    if any(path.exists() and not path.is_dir() for path in output.parents):
        raise InputError(f"{flag}={output} is in a file, not in a folder; name another path")
    if output.exists() and not (output.is_file() and generator in output.read_text(errors="replace")[:100]):
        raise InputError(f"{output} exists and is no {kind}; name another file with {flag}=FILE")
