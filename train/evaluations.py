"""Evaluations during a run: when they are due, on held-out documents and on tasks."""

import gzip
from functools import partial
from typing import Any

import jax
import numpy as np

from train.data_identity import RunInputs
from train.evaluation.documents import loop_documents, loop_pairs, take_bytes
from train.evaluation.five_gram import five_gram_bits_per_byte
from train.evaluation.held_out import evaluate, make_evaluation_step, sample_text
from train.evaluation.preferences import evaluate_pairs, make_pair_step
from train.evaluation.results import Evaluation, evaluation_metrics, task_metrics
from train.run.folder import HeldOutDocument
from train.step.state import abstract_weights
from train.stop import reset_watchdog

# Bytes of training text, from the beginnings of all corpora, that the 5-gram model of `references` counts.
COUNTED_BYTES = 2**22


class Evaluations:
    """The evaluations of a run. `use` must be called before the first."""

    def __init__(self, inputs: RunInputs):
        self._config = inputs.config
        self._mixture = inputs.mixture
        self._tokenizer = inputs.tokenizer
        self._step = make_evaluation_step(self._config)
        self._predicts = not self._config.model.reward_head
        self._pair_step = make_pair_step(self._config) if self._config.objective.compares else None
        alive = partial(reset_watchdog, self._config)
        self._rollouts = inputs.rollouts
        self._on_tasks = inputs.tasks.of_model(self._config, self._tokenizer, alive) if inputs.tasks else None

    def use(self, held_out: list[HeldOutDocument]) -> None:
        """Evaluates on some of these documents from now on, always the same, and also on all of them at the end."""
        self._held_out = held_out
        self._loop_documents = loop_documents(held_out, self._config)
        self._loop_pairs = loop_pairs(held_out, self._config) if self._pair_step else []

    def compile(self) -> None:
        """Compiles the programs of the evaluations on held-out text for one device, by running them on weights of zero.

        Several devices would wait for each other if another thread gave them a step in another order.
        """
        if not self._loop_documents or jax.sharding.get_mesh().size > 1:
            return
        zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
        weights = jax.tree.map(zeros, abstract_weights(self._config))
        if not self._predicts:
            self._of_pairs(weights, None, self._loop_pairs[:1], "validation")
            return
        self._evaluate(weights, self._loop_documents[:1])
        sample_text(self._config, self._tokenizer, weights)

    def are_due(self, step: int, last_step: int) -> bool:
        """True if any evaluation follows a step."""
        return self._text_is_due(step, last_step) or self._tasks_are_due(step, last_step)

    def run(self, step: int, last_step: int, weights: Any, reference: Any = None) -> dict[str, Any]:
        """Runs the evaluations that are due after a step, and returns their fields of metrics.jsonl.

        Of pairs, the loss and the bits a byte are those of the chosen answers; further fields compare the answers, with
        the objective's reference if it has one. A reward model predicts no tokens, and has the further fields alone.
        Where answers are sampled, the reward is that of the most likely ones to a batch of held-out prompts.
        """
        reset_watchdog(self._config)
        fields: dict[str, Any] = {}
        if self._text_is_due(step, last_step):
            if self._predicts:
                fields = evaluation_metrics(self._evaluate(weights, self._loop_documents))
                if step == last_step:
                    fields |= evaluation_metrics(self._evaluate(weights, self._held_out), "held_out")
            fields |= self._of_pairs(weights, reference, self._loop_pairs, "validation")
            if step == last_step:
                fields |= self._of_pairs(weights, reference, self._held_out, "held_out")
            if self._rollouts:
                figures = self._rollouts.evaluate(weights, self._held_out[: self._config.train.batch_size])
                fields |= {f"validation_{name}": value for name, value in figures.items()}
            if self._predicts:
                fields["sample"] = sample_text(self._config, self._tokenizer, weights)
        if self._on_tasks and self._tasks_are_due(step, last_step):
            fields |= task_metrics(self._on_tasks(weights))
        return fields

    def references(self) -> dict[str, float]:
        """Returns the bits a byte of the loop's text by gzip -9, as one file, and by a 5-gram model of bytes.

        It runs during the training, and reads COUNTED_BYTES of its text.
        """
        if not self._loop_documents or not self._predicts:
            return {}
        text = "".join(document.scored for document in self._loop_documents).encode()
        counted: list[HeldOutDocument] = []
        for source in self._mixture.sources:
            texts = source.corpus.training_texts(self._config.train.seed)
            counted += take_bytes(map(HeldOutDocument, texts), COUNTED_BYTES // len(self._mixture.sources))
        return {
            "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
            "5-gram": five_gram_bits_per_byte(counted, self._loop_documents),
        }

    def _evaluate(self, weights: Any, documents: list[HeldOutDocument]) -> dict[str, Evaluation]:
        return evaluate(self._step, weights, documents, self._tokenizer, self._config)

    def _of_pairs(self, weights: Any, reference: Any, documents: list[HeldOutDocument], texts: str) -> dict[str, float]:
        if self._pair_step is None:
            return {}
        figures = evaluate_pairs(self._pair_step, weights, reference, documents, self._tokenizer, self._config)
        names = {"loss": "preference_loss", "accuracy": "preference_accuracy"}
        return {f"{texts}_{names.get(name, name)}": value for name, value in figures.items()}

    # The first evaluation follows step 1, so that an error in it shows at once.
    def _text_is_due(self, step: int, last_step: int) -> bool:
        return bool(self._loop_documents) and (
            step in (1, last_step) or step % self._config.evaluation.every_steps == 0
        )

    def _tasks_are_due(self, step: int, last_step: int) -> bool:
        every = self._config.evaluation.tasks_every_steps
        return self._on_tasks is not None and (step in (1, last_step) or step % every == 0)
