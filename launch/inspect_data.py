"""Show the documents of each row of a step's batch, by file, place and characters, with their text.

With a RUN, reading begins at the nearest position that the run logged before the step; with --config=NAME|FILE, at the
beginning of the run that this command line would start. --summary shows what the corpus holds instead, from a sample.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from launch.arguments import add_json, one_line
from launch.columns import columns
from launch.presets import add_config_arguments, load_config
from launch.streams import DIM, GREEN, PLAIN, is_colored
from train.run.run_name import split_name

if TYPE_CHECKING:
    from data.mixture import Mixture
    from data.tokenizer.tokenizer import Tokenizer
    from train.config.config import Config
    from train.run.folder import Run


class RunData(NamedTuple):
    """The data of a run, opened."""

    config: "Config"
    run: "Run"
    mixture: "Mixture"
    tokenizer: "Tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat inspect data`."""
    parser.add_argument(
        "run", type=one_line, metavar="RUN", nargs="?", help="a run's folder, or RUN@STEP; or give --config"
    )
    parser.add_argument("--step", type=int, metavar="N", help="the step whose batch is shown, from 1")
    parser.add_argument("--row", type=int, metavar="R", help="one row of the batch, from 0 [all]")
    parser.add_argument("--summary", action="store_true", help="show what the corpus holds, from a sample of it")
    add_json(parser)
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints the batch or the summary."""
    if (arguments.run is None) == (arguments.config is None):
        raise InputError("give a RUN or --config=NAME|FILE, one of the two")
    if arguments.run is not None:
        folder, step = split_name(arguments.run)
        if step is not None and arguments.step is not None:
            raise InputError(f"give --step={arguments.step} or {arguments.run}, one of the two")
        arguments.run = folder
        arguments.step = arguments.step if step is None else step
    if (arguments.step is None) != arguments.summary:
        raise InputError("give --step=N or --summary, one of the two")
    from data.provenance import summarize
    from train.step.schedule import read_stages

    with opened(arguments) as data:
        if arguments.summary:
            config = data.config
            stages = read_stages(config, 0, config.train.num_steps)
            summaries = summarize(data.mixture, data.tokenizer, config.train.seed, stages)
            print(json.dumps({"corpora": summaries}) if arguments.json else "\n".join(map(summary_text, summaries)))
            return 0
        rows = batch_rows(data, arguments.step, arguments.row)
        if arguments.config:
            # Files that were made only for this command have no path that a user could open.
            for row in rows:
                for part in row["parts"]:
                    part["file"] = part["file"].removeprefix(f"{data.run.folder}/")
    if arguments.json:
        print(json.dumps({"step": arguments.step, "rows": rows}))
    else:
        print(f"step {arguments.step}")
        colored = is_colored(sys.stdout)
        print("\n".join(row_text(row, colored) for row in rows))
    return 0


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[RunData]:
    """Opens the data of a run, or of the run that the config would start."""
    from train.prepare import check_not_imported, open_run_mixture, run_tokenizer
    from train.run.folder import Run

    if arguments.run is not None:
        if arguments.overrides:
            raise InputError("a RUN has its own config; leave out --config.GROUP.FIELD")
        run = Run(arguments.run)
        config = run.load_config()
        check_not_imported(run)
        yield RunData(config, run, open_run_mixture(config, run), load_tokenizer(run.tokenizer))
        return
    config = load_config(arguments.config, arguments.overrides).resolved()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        mixture = open_run_mixture(config, run)
        yield RunData(config, run, mixture, run_tokenizer(config, run, mixture))


def batch_rows(data: RunData, number: int, only_row: int | None) -> list[dict[str, Any]]:
    """Returns the rows of a step's batch (steps from 1, rows from 0), or one row, with the parts of documents in each.

    Raises InputError where the run has no such step or row.
    """
    from data.provenance import describe_row, rows_of_step
    from train.data_identity import first_step, streams_before
    from train.run.ledger import read_ledger, skipped_batches, skips_by_step
    from train.step.schedule import rows_read

    config = data.config
    step = number - 1
    if not 0 <= step < config.train.num_steps:
        raise InputError(f"--step={number}: the run has steps 1 to {config.train.num_steps}")
    if step < (first := first_step(config)):
        raise InputError(f"--step={number}: the run begins after step {first} of its parent; look there")
    if only_row is not None and not 0 <= only_row < rows_read(config, step):
        raise InputError(f"--row={only_row}: the batch has rows 0 to {rows_read(config, step) - 1}")
    begin, streams = streams_before(step, config, data.run, data.mixture, data.tokenizer)
    skipped = skipped_batches(read_ledger(data.run.recovery)) or config.recovery.batches()
    rows = rows_of_step(streams, begin, step, partial(rows_read, config), skips_by_step(skipped))
    if not rows:
        raise InputError(f"--step={number}: the run ends before it, with the last epoch (data.epochs) of a corpus")
    return [
        describe_row(data.mixture, data.tokenizer, row, corpus, parts)
        for row, corpus, parts in rows
        if only_row in (None, row)
    ]


def row_text(row: dict[str, Any], colored: bool = False) -> str:
    """Returns a row as lines: one for each part of a document, followed by its text, with its mask in color."""
    corpus = f"  corpus {row['corpus']}" if "corpus" in row else ""
    empty = "" if row["parts"] else "  empty: its corpus has ended in this stream"
    lines = [f"row {row['row']}{corpus}{empty}"]
    for part in row["parts"]:
        place = f"byte {part['byte']}" if "byte" in part else f"row {part['table_row']}"
        first, last = part["characters"]
        prompt = f" (the first {part['prompt_characters']} are its prompt)" if "prompt_characters" in part else ""
        if "fim" in part:
            prompt = f" ({part['fim']}, its middle is characters {part['middle'][0]} to {part['middle'][1]})"
        end = ", with its end" if part["end"] else ""
        if "trained" in part:
            end = f", {part['trained_tokens']} of them trained on{end}"
        answer = f", {part['answer']} answer" if "answer" in part else ""
        characters = f"characters {first} to {last}{prompt}"
        lines.append(f"  {part['file']}, {place}{answer}, {characters}: {part['tokens']} tokens{end}")
        lines += [f"  | {line}" for line in (masked(part) if colored else part["text"]).split("\n")]
    return "\n".join(lines)


def masked(part: dict[str, Any]) -> str:
    """Returns the text of a part with what is trained on in green, and the rest dim; each line is colored alone."""
    text, (first, last) = part["text"], part["characters"]
    if "fim" in part:
        return text
    after_prompt = min(max(first, part.get("prompt_characters", 0)), last)
    cuts = [at - first for at in (first, *itertools.chain(*part.get("trained", [[after_prompt, last]])), last)]
    pieces = zip(itertools.cycle((DIM, GREEN)), (text[begin:end] for begin, end in itertools.pairwise(cuts)))
    return "".join(
        "\n".join(f"{color}{line}{PLAIN}" if line else "" for line in piece.split("\n")) for color, piece in pieces
    )


def summary_text(summary: dict[str, Any]) -> str:
    """Returns the estimates of a corpus as lines."""
    figures = {
        "sampled": f"{summary['sampled_documents']:,} documents or pieces, {summary['sampled_bytes']:,} bytes",
        "documents": f"about {summary['documents']:,}",
        "text": f"about {summary['bytes'] / 1e6:,.1f} MB",
        "tokens": f"about {summary['tokens']:,}",
        "bytes a token": f"{summary['bytes_per_token']:.3f}",
        "utilization": f"{summary['utilization']:.2%} of the positions of the sampled rows",
        "epochs": f"about {summary['epochs']:.3f} in the run",
    }
    if summary["trained"] < 1:
        figures["trained on"] = f"{summary['trained']:.2%} of the tokens of the sample"
    if summary["last_step"]:
        figures["end of the run"] = f"near step {summary['last_step']:,}, where data.epochs end"
    warning = f"\nwarning: {summary['order_problem']}" if summary["order_problem"] else ""
    return f"{summary['corpus']}\n" + columns([("", name, value) for name, value in figures.items()]) + warning
