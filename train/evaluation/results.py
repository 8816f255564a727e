"""Results of evaluations, and their fields in metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Figures of a set of documents, EOS tokens included."""

    loss: float  # cross-entropy in nats a token
    bits_per_byte: float  # summed loss in bits divided by the UTF-8 bytes of the text
    accuracy: float  # share of the tokens to which the model gave the highest probability
    tokens: int  # that were predicted
    bytes: int  # of the text in UTF-8
    documents: int


def combine(results: Iterable[Evaluation]) -> Evaluation:
    """Combines the figures of several sets of documents."""
    results = list(results)
    tokens = sum(result.tokens for result in results)
    size = sum(result.bytes for result in results)
    nats = sum(result.loss * result.tokens for result in results)
    right = sum(result.accuracy * result.tokens for result in results)
    documents = sum(result.documents for result in results)
    return Evaluation(nats / tokens, nats / math.log(2) / size, right / tokens, tokens, size, documents)


def evaluation_metrics(by_corpus: Mapping[str, Evaluation], texts: str = "validation") -> dict[str, Any]:
    """Returns fields of metrics.jsonl: of all documents, and of each corpus if there are several.

    Their names begin with `texts`: "validation" are those of the loop, and "held_out" all that the run keeps.
    """

    def fields(result: Evaluation) -> dict[str, float]:
        return {f"{texts}_{name}": asdict(result)[name] for name in ("loss", "bits_per_byte", "accuracy", "tokens")}

    metrics: dict[str, Any] = fields(combine(by_corpus.values()))
    if len(by_corpus) > 1:
        metrics[f"{texts}_by_corpus"] = {name: fields(result) for name, result in by_corpus.items()}
    return metrics


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task or a group of tasks; `error` is its standard error if it is known."""

    task: str
    metric: str
    value: float
    error: float | None


def task_metrics(results: Iterable[TaskResult]) -> dict[str, Any]:
    """Returns the field `tasks` of metrics.jsonl: values by task and metric."""
    values: dict[str, dict[str, float]] = {}
    for result in results:
        values.setdefault(result.task, {})[result.metric] = result.value
    return {"tasks": values}
