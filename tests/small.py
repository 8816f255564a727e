"""Models and batches small enough for a test."""

from typing import Any

import jax
import numpy as np

from model.config import ModelConfig
from model.parameters import initial_weights

VOCAB_SIZE = 300


def small_model(**changes: Any) -> ModelConfig:
    """Two layers of width 32, four heads on two key/value heads, float32."""
    values = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "feedforward_dim": 64}
    values |= {"vocab_size": VOCAB_SIZE, "compute_dtype": "float32", "loss_chunk": 8}
    return ModelConfig(**(values | changes)).resolved()


def small_weights(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Initial weights, with norms that are not all one."""
    weights = initial_weights(config, seed)
    keys = iter(jax.random.split(jax.random.key(seed), 3))
    for norm in (weights["norm"], weights["blocks"]["attention_norm"], weights["blocks"]["feedforward_norm"]):
        norm["scale"] += 0.2 * jax.random.normal(next(keys), norm["scale"].shape)
    return weights


def small_batch(rows: int = 8, length: int = 16, seed: int = 0, padding: bool = True) -> dict[str, np.ndarray]:
    """A batch of random documents as the segmenter would cut them, masked; the last row ends in padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB_SIZE, (rows, length + 1), dtype=np.int32)
    begins = random.random((rows, length)) < 0.15
    begins[:, 0] = True
    segment_ids = np.cumsum(begins, axis=1, dtype=np.int32)
    last_begin = np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1)
    positions = (np.arange(length) - last_begin).astype(np.int32)
    loss_weights = np.ones((rows, length), np.float32)
    if padding:
        segment_ids[-1, length // 2 :] = 0
        loss_weights[-1, length // 2 :] = 0
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_weights": loss_weights,
    }
