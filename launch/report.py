"""Write one HTML page of a run, at any moment: its state, what was measured, what happened, where its time went."""

import argparse

from launch.arguments import check_output, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat report`."""
    parser.add_argument("run_folder", metavar="RUN", type=path, help="a run's folder")
    parser.add_argument("--output", metavar="FILE", type=path, help="file of the page [RUN/report.html]")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from data.files.atomic import atomic_file
    from launch.page.report_page import GENERATOR, make_page
    from train.prepare import check_not_imported
    from train.run.folder import Run

    run = Run(arguments.run_folder)
    check_not_imported(run)
    page = make_page(run)
    output = arguments.output or arguments.run_folder / "report.html"
    check_output(output, "--output", GENERATOR, "report")
    with atomic_file(output) as partial:
        partial.write_text(page)
    print(output)
    return 0
