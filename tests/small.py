"""Models and batches small enough for a test."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model.config import ModelConfig
from model.parameters import CONSTANT, initial_weights, parameter_table
from model.trees import flattened, nested
from train.devices.mesh import explicit_mesh

VOCAB_SIZE = 300
# What records of training speed add to a decoder, all at once.
RECORDS: dict[str, Any] = {
    "smear": True,
    "attention_gate": True,
    "value_embedding_every": 2,
    "residual_scalars": True,
    "zero_init_outputs": True,
    "activation": "relu2",
    "gated": False,
    "logit_softcap": 15.0,
}


def small_model(**changes: Any) -> ModelConfig:
    """Two layers of width 32, four heads on two key/value heads, float32."""
    values = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "feedforward_dim": 64}
    values |= {"vocab_size": VOCAB_SIZE, "compute_dtype": "float32", "loss_chunk": 64}
    return ModelConfig(**(values | changes)).resolved()


def small_weights(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Initial weights, with norms, biases and others that begin alike so that they are not all the same."""
    # New arrays each time: a step takes the memory of those that it is given.
    return nested({name: jnp.array(value) for name, value in _weights(config, seed).items()})


@functools.cache
def _weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    return jax.device_get(_made(config, seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _made(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    weights = flattened(initial_weights(config, seed))
    constant = [name for name, p in parameter_table(config).items() if p.role in CONSTANT or p.scale == 0]
    for name, key in zip(constant, jax.random.split(jax.random.key(seed), len(constant)), strict=True):
        weights[name] += 0.2 * jax.random.normal(key, weights[name].shape)
    return weights


def mesh_of(slices: int = 1, data: int = 1, fsdp: int = 1, expert: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """The first virtual devices, so many on each axis."""
    shape = (slices, data, fsdp, expert, context, tensor)
    return explicit_mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape))


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
