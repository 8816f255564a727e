"""Write one HTML page of a run, at any moment: its state, what was measured, what happened, where its time went.

Of several runs the page lays their curves over each other, by the tokens that each has read.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from data.errors import InputError
from launch.arguments import check_output, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat report`."""
    parser.add_argument("run_folders", metavar="RUN", nargs="+", type=path, help="a run's folder, or several")
    help = "file of the page [RUN/report.html; of several runs compare.html in this folder]"
    parser.add_argument("--output", metavar="FILE", type=path, help=help)


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from data.files.atomic import atomic_file
    from launch.page.overlay_page import make_overlay_page
    from launch.page.report_page import GENERATOR, make_page
    from train.prepare import check_not_imported
    from train.run.folder import Run

    folders = arguments.run_folders
    runs = [Run(folder) for folder in folders]
    for run in runs:
        check_not_imported(run)
    if len(runs) == 1:
        page, usual = make_page(runs[0]), folders[0] / "report.html"
    else:
        groups = {name: [run] for name, run in zip(names_of(folders), runs, strict=True)}
        page, usual = make_overlay_page(f"{len(runs)} runs", groups), Path("compare.html")
    output = arguments.output or usual
    check_output(output, "--output", GENERATOR, "report")
    with atomic_file(output) as partial:
        partial.write_text(page)
    print(output)
    return 0


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns the last parts of paths, as many as tell them apart. Raises InputError where a folder is named twice."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise InputError(f"{twice} is named twice; name each run once")
    most = max(len(path.parts) for path in paths)
    names = (["/".join(path.parts[-count:]) for path in paths] for count in range(1, most + 1))
    return next(distinct for distinct in names if len(set(distinct)) == len(paths))
