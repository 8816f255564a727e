"""Where the batch of a step is from: the documents of each row, by file, place and characters, and their text.

Of a run it begins at the position logged nearest before the step; with --config=NAME|FILE, at the beginning of the run
that this would start. --summary says instead what the corpus holds, from a sample.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from launch.presets import add_config_arguments, load_config
from train.run.name import split_name

if TYPE_CHECKING:
    from data.mixture import Mixture
    from data.tokenizer.tokenizer import Tokenizer
    from train.config.config import Config
    from train.run.folder import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat inspect data`."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's folder, or RUN@STEP; or give --config")
    parser.add_argument("--step", type=int, metavar="N", help="the step whose batch is shown, from 1")
    parser.add_argument("--row", type=int, metavar="R", help="one row of the batch, from 0; none: all")
    parser.add_argument("--summary", action="store_true", help="say what the corpus holds, from a sample of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Print the batch or the summary."""
    from data.provenance import describe_row, rows_of_step, summarize
    from train.data_identity import first_step, streams_before
    from train.run.ledger import read_ledger, skipped_batches, skips_by_step
    from train.step.schedule import batch_size

    if (arguments.run is None) == (arguments.config is None):
        raise InputError("give a RUN or --config=NAME|FILE, one of the two")
    if arguments.run is not None:
        folder, step = split_name(arguments.run)
        if step is not None and arguments.step is not None:
            raise InputError(f"give --step={arguments.step} or {arguments.run}, one of the two")
        arguments.run, arguments.step = folder, arguments.step if step is None else step
    if (arguments.step is None) != arguments.summary:
        raise InputError("give --step=N or --summary, one of the two")
    with opened(arguments) as (config, run, mixture, tokenizer):
        if arguments.summary:
            tokens = [batch_size(config, step) * config.data.segment_length for step in range(config.train.num_steps)]
            summaries = summarize(mixture, tokenizer, config.train.seed, tokens)
            print(json.dumps({"corpora": summaries}) if arguments.json else "\n".join(map(summary_text, summaries)))
            return 0
        step = arguments.step - 1
        if not 0 <= step < config.train.num_steps:
            raise InputError(f"--step={arguments.step}: the run has steps 1 to {config.train.num_steps}")
        if step < (first := first_step(config)):
            raise InputError(f"--step={arguments.step}: the run begins after step {first} of its parent; look there")
        if arguments.row is not None and not 0 <= arguments.row < batch_size(config, step):
            raise InputError(f"--row={arguments.row}: the batch has rows 0 to {batch_size(config, step) - 1}")
        begin, streams = streams_before(step, config, run, mixture, tokenizer)
        sizes = [batch_size(config, s) for s in range(begin, step + 1)]
        skipped = skipped_batches(read_ledger(run.recovery)) or config.recovery.batches()
        skips = skips_by_step(skipped)
        rows = [
            describe_row(mixture, tokenizer, b, k, parts)
            for b, k, parts in rows_of_step(streams, sizes, step, skips)
            if arguments.row in (None, b)
        ]
        if arguments.config:
            # What is made for the look alone has no path.
            for part in (part for row in rows for part in row["parts"]):
                part["file"] = part["file"].removeprefix(f"{run.folder}/")
    if arguments.json:
        print(json.dumps({"step": arguments.step, "rows": rows}))
    else:
        print(f"step {arguments.step}")
        print("\n".join(map(row_text, rows)))
    return 0


@contextmanager
def opened(arguments: argparse.Namespace) -> "Iterator[tuple[Config, Run, Mixture, Tokenizer]]":
    """The data of a run, or of one that the config would start."""
    from train.prepare import open_run_mixture, run_tokenizer
    from train.run.folder import Run

    if arguments.run is not None:
        if arguments.overrides:
            raise InputError("a RUN has its own config; leave out --config.GROUP.FIELD")
        run = Run(arguments.run)
        config = run.load_config()
        run.check_not_imported()
        tokenizer = load_tokenizer(run.tokenizer)
        yield config, run, open_run_mixture(config, run), tokenizer
        return
    config = load_config(arguments.config, arguments.overrides).resolved()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        mixture = open_run_mixture(config, run)
        yield config, run, mixture, run_tokenizer(config, run, mixture)


def row_text(row: dict[str, Any]) -> str:
    """A row as lines."""
    corpus = f"  corpus {row['corpus']}" if "corpus" in row else ""
    lines = [f"row {row['row']}{corpus}" + ("" if row["parts"] else "  empty: its corpus has ended in this stream")]
    for part in row["parts"]:
        place = f"byte {part['byte']}" if "byte" in part else f"row {part['table_row']}"
        first, last = part["characters"]
        prompt = f" (the first {part['prompt_characters']} are its prompt)" if "prompt_characters" in part else ""
        lines.append(
            f"  {part['file']}, {place}, characters {first} to {last}{prompt}: {part['tokens']} tokens"
            f"{', with its end' if part['end'] else ''}"
        )
        lines += [f"  | {line}" for line in part["text"].split("\n")]
    return "\n".join(lines)


def summary_text(summary: dict[str, Any]) -> str:
    """A corpus as lines."""
    figures = {
        "sampled": f"{summary['sampled_documents']:,} documents or pieces, {summary['sampled_bytes']:,} bytes",
        "documents": f"about {summary['documents']:,}",
        "text": f"about {summary['bytes'] / 1e6:,.1f} MB",
        "tokens": f"about {summary['tokens']:,}",
        "bytes a token": f"{summary['bytes_per_token']:.3f}",
        "utilization": f"{summary['utilization']:.2%} of the positions of the sampled rows",
        "epochs": f"about {summary['epochs']:.3f} in the run",
    }
    return "\n".join([f"{summary['corpus']}", *(f"  {name:13}  {value}" for name, value in figures.items())])
