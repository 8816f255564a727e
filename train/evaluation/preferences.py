"""Figures of held-out pairs of answers: the loss of the objective, its accuracy and its margin."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from data.segmenter import DocumentPairs, make_segment, pack, row_length
from data.tokenizer.tokenizer import Tokenizer
from model.context_parallel import to_zigzag
from train.config.config import ResolvedConfig
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options, sum_loss_weights
from train.evaluation.held_out import Batch, pairs_of, put_on_devices, stack_rows
from train.run.folder import HeldOutDocument
from train.step.objective import pair_figures

log = logging.getLogger("ziggurat")
FIGURES = ("loss", "accuracy", "margin")
PairStep = Callable[[Any, Any, Batch], list[jax.Array]]


def make_pair_step(config: ResolvedConfig) -> PairStep:
    """Compiles the function (weights, reference or None, batch) → sums of `FIGURES` over the pairs."""

    def pair_step(weights: Any, reference: Any, batch: Batch) -> list[jax.Array]:
        # On CPU devices, this all-reduce comes before every other collective.
        batch, _ = sum_loss_weights(batch)
        layout = training_layout(config.mesh)
        batch = {name: to_zigzag(x, layout) for name, x in batch.items()}
        sums = pair_figures(config, weights, reference, batch, layout)
        return [sums[name] for name in FIGURES]

    return jax.jit(pair_step, compiler_options=compiler_options())


def evaluate_pairs(
    step: PairStep,
    weights: Any,
    reference: Any,
    documents: Sequence[HeldOutDocument],
    tokenizer: Tokenizer,
    config: ResolvedConfig,
) -> dict[str, float]:
    """Returns the means of `FIGURES` over held-out pairs, the same on all processes, and "pairs", their number.

    Pairs that are longer than a row are left out with a warning; without a pair there are no figures.
    """
    made = [pair_of(tokenizer, document) for document in documents if document.rejected]
    fit = [pairs for pairs in made if pairs.length <= row_length(config.data)]
    if len(fit) < len(made) and jax.process_index() == 0:
        log.warning("%d held-out pairs are longer than a row, and are not evaluated", len(made) - len(fit))
    if not fit:
        return {}
    sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
    rows = (make_segment(parts, config.data) for parts in pack(fit, config.data))
    totals = dict.fromkeys(FIGURES, 0.0)
    for batch in stack_rows(rows, config.train.batch_size // config.train.accumulation_steps):
        sums = step(weights, reference, put_on_devices(batch, sharding))
        for name, value in zip(FIGURES, jax.device_get(sums), strict=True):
            totals[name] += float(value)
    return {name: total / len(fit) for name, total in totals.items()} | {"pairs": len(fit)}


def pair_of(tokenizer: Tokenizer, document: HeldOutDocument) -> DocumentPairs:
    """Returns a held-out pair of answers, tokenized as in training."""
    assert document.rejected
    text, answers = document.rejected
    rejected = pairs_of(tokenizer, document._replace(text=text, answers=answers, rejected=None))
    return pairs_of(tokenizer, document)._replace(rejected=rejected)
