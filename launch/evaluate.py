"""Evaluate a run or exported weights: loss and bits per byte on text, and tasks of lm-evaluation-harness.

The text is the run's held-out documents, or --corpus; with --tasks alone there is none.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from train.evaluation.results import Result
    from train.run.folder import Text
    from train.weights.load import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat evaluate`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument(
        "--corpus", metavar="PATH", help="file, folder, glob or URL of text; all of its documents count"
    )
    parser.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks, groups or tags of the harness")
    parser.add_argument(
        "--task_dir", metavar="FOLDER", help="folder with the tasks' YAML files; left out: the harness's own tasks"
    )
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each document [as the task says]")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task, at most [all]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the figures go to standard output."""
    check(arguments)
    import jax

    from train.devices.mesh import on_one_device
    from train.evaluation.held_out import evaluate, gzip_bits_per_byte, make_evaluation_step
    from train.evaluation.results import task_metrics, total
    from train.evaluation.tasks import open_tasks
    from train.weights.load import load_trained

    tasks = None
    if arguments.tasks is not None:
        tasks = open_tasks(arguments.tasks, arguments.task_dir, arguments.limit, arguments.num_fewshot, "--tasks")
    figures: dict[str, Any] = {}
    by_corpus: dict[str, Any] = {}
    scores: list[Result] = []
    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        config = trained.config
        if trained.step is not None:
            figures["step"] = trained.step
        if tasks is None or arguments.corpus is not None:
            texts = texts_of(arguments, trained)
            results = evaluate(make_evaluation_step(config), trained.weights, texts, trained.tokenizer, config)
            figures |= dataclasses.asdict(total(results.values())) | {"gzip_bits_per_byte": gzip_bits_per_byte(texts)}
            if len(results) > 1:
                by_corpus = {name: dataclasses.asdict(result) for name, result in results.items()}
        if tasks is not None:
            scores = tasks.of_model(config, trained.tokenizer, errors=True)(trained.weights)
    if arguments.json:
        errors = task_metrics([dataclasses.replace(s, value=s.error) for s in scores if s.error is not None])["tasks"]
        found = task_metrics(scores) | {"task_errors": errors} if scores else {}
        print(json.dumps(figures | ({"by_corpus": by_corpus} if by_corpus else {}) | found))
        return 0
    print("\n".join(line(name, value) for name, value in figures.items()))
    for corpus, of_corpus in by_corpus.items():
        print("\n".join([f"corpus {corpus}", *(f"  {line(name, value)}" for name, value in of_corpus.items())]))
    if scores:
        print("\n".join(table(scores)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """InputError with everything that is wrong with the flags."""
    problems = []
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            problems.append(f"--{name}={value} must be at least {least}")
    if arguments.tasks is None:
        given = [name for name in ("task_dir", "num_fewshot", "limit") if getattr(arguments, name) is not None]
        problems += [f"--{name} has no effect without --tasks; name tasks, or leave it out" for name in given]
    if problems:
        raise InputError("\n".join(problems))


def texts_of(arguments: argparse.Namespace, trained: "Trained") -> "list[Text]":
    """The documents that are asked for. InputError where there is none."""
    from data.corpus import open_corpus
    from train.run.folder import Text

    if arguments.corpus is not None:
        # Nothing is held out of it, so that a short text is enough.
        whole = dataclasses.replace(trained.config.data, num_streams=1, validation_fraction=0.0)
        found = open_corpus(arguments.corpus, whole, field="--corpus").all_documents()
        texts = [Text(document.text, document.prompt) for document in found]
    elif trained.run is None:
        raise InputError(f"{arguments.model} holds weights without documents; give --corpus=PATH or --tasks=NAME")
    elif not (texts := trained.run.held_out_texts()):
        raise InputError(f"{arguments.model} held no documents out; give --corpus=PATH")
    if not texts:
        raise InputError(f"--corpus={arguments.corpus} has no text to evaluate on")
    return texts


def table(results: "Sequence[Result]") -> list[str]:
    """A line for each metric of each task: its value, ± its standard error."""
    rows = [("task", "metric", f"{'value':>10}")]
    for result in results:
        error = f" ± {result.error:.4f}" if result.error is not None else ""
        rows.append((result.task, result.metric, f"{result.value:10.4f}{error}"))
    task, metric, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"{row[0]:{task}}  {row[1]:{metric}}  {row[2]}" for row in rows]


def line(name: str, value: float) -> str:
    """A figure of the table."""
    return f"{name:18} {value:,.4f}" if isinstance(value, float) else f"{name:18} {value:,}"
