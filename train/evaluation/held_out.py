"""Loss and bits per byte on whole documents, and the sample of an evaluation."""

import gzip
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from data.conversations import conversation_pairs
from data.segmenter import DocumentPairs, make_pairs, segment_documents
from data.tokenizer.tokenizer import Tokenizer
from model.context_parallel import to_zigzag
from model.decoder import Decoder
from model.generation.sampling import Sampling
from model.loss import predictions
from train.config.config import ResolvedConfig
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options, sum_loss_weights
from train.evaluation.continuation import make_generator
from train.evaluation.documents import by_corpus
from train.evaluation.results import Evaluation
from train.run.folder import HeldOutDocument

Batch = Mapping[str, jax.Array]
EvaluationStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_evaluation_step(config: ResolvedConfig) -> EvaluationStep:
    """Compiles the function (weights, batch) → ([summed loss in nats, tokens predicted right], summed loss weight).

    A token is predicted right where no other is more likely. All sums are weighted by `loss_weights`.
    """

    def evaluation_step(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch, loss_weight = sum_loss_weights(batch)
        log_p_BT, is_first_BT, weights_BT = predicted(config, weights, batch)
        # Stacked, both sums take one all-reduce.
        return jnp.sum(jnp.stack([-log_p_BT, is_first_BT]) * weights_BT, axis=(1, 2)), loss_weight

    return jax.jit(evaluation_step, compiler_options=compiler_options())


def predicted(config: ResolvedConfig, weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the `predictions` of a batch and its loss weights in the same order of positions, [B, T] each."""
    layout = training_layout(config.mesh)
    batch = {name: to_zigzag(x, layout) for name, x in batch.items()}
    decoder = Decoder(config.model, weights, layout)
    x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
    matrix_DV = decoder.unembedding_matrix()
    return *predictions(x_BTD, matrix_DV, batch["targets"], config.model, layout), batch["loss_weights"]


def evaluate(
    step: EvaluationStep, weights: Any, texts: Sequence[HeldOutDocument], tokenizer: Tokenizer, config: ResolvedConfig
) -> dict[str, Evaluation]:
    """Evaluates documents, the same on all processes; a token's context is its segment. Returns figures by corpus."""
    sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
    batch_size = config.train.batch_size // config.train.accumulation_steps

    results = {}
    for name, group in by_corpus(texts).items():
        loss = right = weight = 0.0
        pairs = [*map(partial(pairs_of, tokenizer), group)]
        for batch in stack_rows(segment_documents(pairs, config.data), batch_size):
            sums, batch_weight = step(weights, put_on_devices(batch, sharding))
            batch_loss, batch_right = np.asarray(sums).tolist()
            loss += batch_loss
            right += batch_right
            weight += float(batch_weight)
        size = sum(map(partial(scored_bytes, tokenizer), group, pairs))
        bits = loss / math.log(2) / size
        results[name] = Evaluation(loss / weight, bits, right / weight, int(weight), size, len(group))
    return results


def pairs_of(tokenizer: Tokenizer, text: HeldOutDocument) -> DocumentPairs:
    """Returns the pairs of a held-out document's tokens; of a pair of answers, those of the chosen one."""
    if text.answers is not None:
        return conversation_pairs(tokenizer.encode_marked, text.text, text.answers)
    prompt = tokenizer.encode(text.prompt)
    tokens = np.concatenate([prompt, tokenizer.encode(text.text)])
    return make_pairs(tokens, tokenizer.bos_ids, tokenizer.eos_id, not text.cut, len(prompt))


def scored_bytes(tokenizer: Tokenizer, text: HeldOutDocument, pairs: DocumentPairs) -> int:
    """Returns the UTF-8 bytes of the text whose tokens are scored; of a conversation, its answers without marks."""
    if text.answers is None:
        return len(text.text.encode())
    return sum(len(tokenizer.token_bytes(token)) for token in pairs.targets[pairs.trained].tolist())


def put_on_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> Batch:
    """Places arrays that every process has on the devices."""
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


def stack_rows(rows: Iterable[dict[str, np.ndarray]], size: int) -> Iterable[dict[str, np.ndarray]]:
    """Stacks rows [T] into batches [size, T]; the last batch is filled with rows of no weight."""
    rows = iter(rows)
    while group := list(itertools.islice(rows, size)):
        empty = {name: np.zeros_like(array) for name, array in group[0].items()}
        group += [empty] * (size - len(group))
        yield {name: np.stack([row[name] for row in group]) for name in empty}


def gzip_bits_per_byte(texts: Sequence[HeldOutDocument]) -> float:
    """Returns the bits per byte of `gzip -9` on the same documents, one by one, as a baseline."""
    encoded = [text.scored.encode() for text in texts]
    return 8 * sum(len(gzip.compress(text, 9, mtime=0)) for text in encoded) / sum(map(len, encoded))


def sample_text(config: ResolvedConfig, tokenizer: Tokenizer, weights: Any) -> str:
    """Continues `evaluation.prompt` with top-k sampling of 40, always with the same seed; "" if by no tokens."""
    if not config.evaluation.sample_tokens:
        return ""
    prompt = tokenizer.encode_with_bos(config.evaluation.prompt)
    generator = make_generator(config, weights, tokenizer)
    pieces = generator([prompt], max_new_tokens=config.evaluation.sample_tokens, sampling=Sampling(top_k=40))
    return tokenizer.decode([*prompt, *(token for piece in pieces for token in piece.tokens)])
