"""Evaluate a run or exported weights: loss and bits per byte on text, and tasks of lm-evaluation-harness.

The text is the run's held-out documents, or --corpus. With --tasks and no --corpus, only the tasks are evaluated.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from launch.arguments import add_json, add_model, one_line, too_small
from launch.columns import columns

if TYPE_CHECKING:
    from train.config.config import ResolvedConfig
    from train.evaluation.results import TaskResult
    from train.run.folder import HeldOutDocument
    from train.weights.load import Trained

log = logging.getLogger("ziggurat")
# Attention over a row takes memory by the square of its length; rows of weights from elsewhere are at most so long.
LONGEST_ROW = 4096
SHORT_ROW = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat evaluate`."""
    add_model(parser)
    help = "file, folder, glob or URL of text, all of whose documents are evaluated"
    parser.add_argument("--corpus", type=one_line, metavar="PATH", help=help)
    parser.add_argument("--tasks", type=one_line, metavar="NAME[,NAME]", help="tasks, groups or tags of the harness")
    help = "folder with the tasks' YAML files [the harness's own]"
    parser.add_argument("--task_dir", type=one_line, metavar="FOLDER", help=help)
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each document [the task's own]")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task, at most [all]")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and prints the figures."""
    problems = too_small(arguments, {"num_fewshot": 0, "limit": 1})
    if arguments.tasks is None:
        unused = [name for name in ("task_dir", "num_fewshot", "limit") if getattr(arguments, name) is not None]
        problems += [f"--{name} has no effect without --tasks; name tasks, or leave it out" for name in unused]
    if problems:
        raise InputError("\n".join(problems))
    import jax

    from train.devices.mesh import one_device_mesh
    from train.evaluation.held_out import evaluate, gzip_bits_per_byte, make_evaluation_step
    from train.evaluation.results import combine, task_metrics
    from train.evaluation.tasks import open_tasks
    from train.weights.load import load_trained

    tasks = None
    if arguments.tasks is not None:
        tasks = open_tasks(arguments.tasks, arguments.task_dir, arguments.limit, arguments.num_fewshot, "--tasks")
    figures: dict[str, Any] = {}
    by_corpus: dict[str, dict[str, Any]] = {}
    scores: list[TaskResult] = []
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(arguments.model)
        if trained.step is not None:
            figures["step"] = trained.step
        if tasks is None or arguments.corpus is not None:
            texts = texts_of(arguments, trained)
            config = with_bounded_rows(trained, texts)
            results = evaluate(make_evaluation_step(config), trained.weights, texts, trained.tokenizer, config)
            figures |= dataclasses.asdict(combine(results.values())) | {"gzip_bits_per_byte": gzip_bits_per_byte(texts)}
            if len(results) > 1:
                by_corpus = {name: dataclasses.asdict(result) for name, result in results.items()}
        if tasks is not None:
            scores = tasks.of_model(with_bounded_rows(trained), trained.tokenizer, errors=True)(trained.weights)
    if not arguments.json:
        print(as_text(figures, by_corpus, scores))
        return 0
    if by_corpus:
        figures["by_corpus"] = by_corpus
    if scores:
        errors = [dataclasses.replace(score, value=score.error) for score in scores if score.error is not None]
        figures |= task_metrics(scores) | {"task_errors": task_metrics(errors)["tasks"]}
    print(json.dumps(figures))
    return 0


def with_bounded_rows(trained: "Trained", texts: "Sequence[HeldOutDocument]" = ()) -> "ResolvedConfig":
    """Returns the settings of a model; weights from elsewhere get rows that fit into memory, whatever their context.

    The rows are as long as the longest of the texts needs; without texts, as the context or LONGEST_ROW allows.
    """
    config, context = trained.config, trained.config.data.segment_length
    if trained.step or context <= SHORT_ROW:
        return config
    # Tokens before each text and one after it.
    around = len(trained.tokenizer.bos_ids) + 1
    needed = max((len(trained.tokenizer.encode(t.prompt + t.text)) + around for t in texts), default=context)
    length = min(context, LONGEST_ROW, max(SHORT_ROW, 1 << (needed - 1).bit_length()))
    if length < min(needed, context):
        log.warning("the context is %d tokens; evaluated in windows of at most %d", context, LONGEST_ROW)
    rows = min(config.train.batch_size, max(1, LONGEST_ROW // length))
    data = dataclasses.replace(config.data, segment_length=length, num_streams=rows)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, batch_size=rows))


def texts_of(arguments: argparse.Namespace, trained: "Trained") -> "list[HeldOutDocument]":
    """Returns the documents to evaluate. Raises InputError where there are none."""
    from data.conversations import open_template
    from data.corpus import open_corpus
    from train.run.folder import HeldOutDocument

    if arguments.corpus is not None:
        # No document is held out, and one stream reads all of them, so that a short text is enough.
        settings = dataclasses.replace(trained.config.data, num_streams=1, validation_fraction=0.0, chat_template=None)
        template = open_template(settings, trained.tokenizer)
        documents = open_corpus(arguments.corpus, settings, field="--corpus", template=template).all_documents()
        texts = [HeldOutDocument(d.text, d.prompt, answers=d.answers) for d in documents]
        if not texts:
            raise InputError(f"--corpus={arguments.corpus} has no text to evaluate on")
        return texts
    if trained.run is None:
        raise InputError(f"{arguments.model} holds weights without documents; give --corpus=PATH or --tasks=NAME")
    if not (texts := trained.run.held_out_texts()):
        raise InputError(f"{arguments.model} held no documents out; give --corpus=PATH")
    return texts


def as_text(figures: Mapping[str, Any], by_corpus: Mapping[str, Mapping[str, Any]], scores: "list[TaskResult]") -> str:
    """Returns a line for each figure, and a table with the value ± standard error of each task's metrics."""
    lines = [line(name, value) for name, value in figures.items()]
    for corpus, values in by_corpus.items():
        lines += [f"corpus {corpus}", *(f"  {line(name, value)}" for name, value in values.items())]
    if scores:
        rows = [("task", "metric", f"{'value':>10}")]
        for score in scores:
            error = "" if score.error is None else f" ± {score.error:.4f}"
            rows.append((score.task, score.metric, f"{score.value:10.4f}{error}"))
        lines.append(columns(rows))
    return "\n".join(lines)


def line(name: str, value: float) -> str:
    """Returns the line of one figure."""
    return f"{name:18} {value:,.4f}" if isinstance(value, float) else f"{name:18} {value:,}"
