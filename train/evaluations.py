"""Evaluations during a run: when they are due, on held-out documents and on tasks."""

from functools import partial
from typing import Any

from train.data_identity import RunInputs
from train.evaluation.documents import loop_documents
from train.evaluation.held_out import evaluate, make_evaluation_step, sample_text
from train.evaluation.results import Evaluation, evaluation_metrics, task_metrics
from train.run.folder import HeldOutDocument
from train.stop import reset_watchdog


class Evaluations:
    """The evaluations of a run. `use` must be called before the first."""

    def __init__(self, inputs: RunInputs):
        self._config = inputs.config
        self._tokenizer = inputs.tokenizer
        self._step = make_evaluation_step(self._config)
        alive = partial(reset_watchdog, self._config)
        self._on_tasks = inputs.tasks.of_model(self._config, self._tokenizer, alive) if inputs.tasks else None

    def use(self, held_out: list[HeldOutDocument]) -> None:
        """Evaluates on some of these documents from now on, always the same, and also on all of them at the end."""
        self._held_out = held_out
        self._loop_documents = loop_documents(held_out, self._config)

    def are_due(self, step: int, last_step: int) -> bool:
        """True if any evaluation follows a step."""
        return self._text_is_due(step, last_step) or self._tasks_are_due(step, last_step)

    def run(self, step: int, last_step: int, weights: Any) -> dict[str, Any]:
        """Runs the evaluations that are due after a step, and returns their fields of metrics.jsonl."""
        reset_watchdog(self._config)
        fields: dict[str, Any] = {}
        if self._text_is_due(step, last_step):
            fields = evaluation_metrics(self._evaluate(weights, self._loop_documents))
            if step == last_step:
                fields |= evaluation_metrics(self._evaluate(weights, self._held_out), "held_out")
            fields["sample"] = sample_text(self._config, self._tokenizer, weights)
        if self._on_tasks and self._tasks_are_due(step, last_step):
            fields |= task_metrics(self._on_tasks(weights))
        return fields

    def _evaluate(self, weights: Any, documents: list[HeldOutDocument]) -> dict[str, Evaluation]:
        return evaluate(self._step, weights, documents, self._tokenizer, self._config)

    # The first evaluation follows step 1, so that an error in it shows at once.
    def _text_is_due(self, step: int, last_step: int) -> bool:
        return bool(self._loop_documents) and (
            step in (1, last_step) or step % self._config.evaluation.every_steps == 0
        )

    def _tasks_are_due(self, step: int, last_step: int) -> bool:
        every = self._config.evaluation.tasks_every_steps
        return self._on_tasks is not None and (step in (1, last_step) or step % every == 0)
