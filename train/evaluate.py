"""Loss and bits per byte on whole documents."""

import gzip
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.segmenter import segment_documents
from data.tokenizer import Tokenizer
from train.config import Config
from train.mesh import batch_sharding
from train.step import summed_loss


@dataclass(frozen=True)
class Evaluation:
    """Result over a set of documents: `loss` in nats a token; `bits_per_byte` of their UTF-8 text, EOS included."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int

    def metrics(self) -> dict[str, float]:
        """As fields of a line of metrics.jsonl."""
        names = {"loss": "validation_loss", "bits_per_byte": "validation_bits_per_byte", "tokens": "validation_tokens"}
        return {names[name]: value for name, value in asdict(self).items() if name in names}


Batch = Mapping[str, jax.Array]
EvaluationStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_evaluation_step(config: Config) -> EvaluationStep:
    """The compiled function (weights, batch) → (summed loss in nats, summed loss weight)."""

    def evaluation_step(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return summed_loss(config, weights, batch)[1], jnp.sum(batch["loss_weights"])

    return jax.jit(evaluation_step)


def evaluate(
    step: EvaluationStep,
    weights: Any,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
) -> Evaluation:
    """Evaluate documents, cut into segments as in training: each token is predicted from its segment alone.

    Args:
        step: from `make_evaluation_step`.
        weights: nested, on the run's mesh.
        texts: whole documents; every process gives the same ones.
        tokenizer: of the run.
        config: batch size, segment length and masking.

    Returns:
        Figures over all tokens of all documents, their EOS included.
    """
    mesh = jax.sharding.get_mesh()
    sharding = batch_sharding(mesh)
    rows = segment_documents((tokenizer.encode(text) for text in texts), tokenizer.eos_id, config.data)
    batch_size = config.train.batch_size // config.train.accumulation_steps
    loss = weight = 0.0
    for batch in batches(rows, batch_size):
        arrays = {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}
        batch_loss, batch_weight = step(weights, arrays)
        loss, weight = loss + float(batch_loss), weight + float(batch_weight)
    size = sum(len(text.encode()) for text in texts)
    return Evaluation(loss / weight, loss / math.log(2) / size, int(weight), size, len(texts))


def batches(rows: Iterable[dict[str, np.ndarray]], size: int) -> Iterable[dict[str, np.ndarray]]:
    """Rows [T] stacked `size` at a time [size, T]; the last batch is filled up with rows of no weight."""
    rows = iter(rows)
    while group := list(itertools.islice(rows, size)):
        empty = {name: np.zeros_like(array) for name, array in group[0].items()}
        group += [empty] * (size - len(group))
        yield {name: np.stack([row[name] for row in group]) for name in empty}


def gzip_bits_per_byte(texts: Sequence[str]) -> float:
    """What `gzip -9` needs for the same documents, one by one: the figure to be below."""
    compressed = sum(len(gzip.compress(text.encode(), 9, mtime=0)) for text in texts)
    return 8 * compressed / sum(len(text.encode()) for text in texts)
