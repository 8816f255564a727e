"""Results of evaluations, and their fields in metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Result over a set of documents: `loss` in nats a token; `bits_per_byte` of their UTF-8 text, EOS included."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int


def combine(results: Iterable[Evaluation]) -> Evaluation:
    """Of several sets of documents as one."""
    results = list(results)
    tokens, size = sum(result.tokens for result in results), sum(result.bytes for result in results)
    nats = sum(result.loss * result.tokens for result in results)
    return Evaluation(nats / tokens, nats / math.log(2) / size, tokens, size, sum(r.documents for r in results))


def evaluation_metrics(by_corpus: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Fields of a line of metrics.jsonl: of all documents, and of each corpus where there are several."""

    def fields(result: Evaluation) -> dict[str, float]:
        return {f"validation_{name}": asdict(result)[name] for name in ("loss", "bits_per_byte", "tokens")}

    found: dict[str, Any] = fields(combine(by_corpus.values()))
    if len(by_corpus) > 1:
        found["validation_by_corpus"] = {name: fields(result) for name, result in by_corpus.items()}
    return found


@dataclass(frozen=True)
class TaskResult:
    """The metric of a task or group of tasks; `error` is its standard error, where it is known."""

    task: str
    metric: str
    value: float
    error: float | None


def task_metrics(results: Iterable[TaskResult]) -> dict[str, Any]:
    """The field `tasks` of a line of metrics.jsonl: values by task and metric."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        found.setdefault(result.task, {})[result.metric] = result.value
    return {"tasks": found}
