"""Floor 5, linear + softmax: each position's vector becomes a score for every token that may come next.

The softmax itself is in `model.loss` (training, evaluation) and `model.generation` (sampling): both take these logits.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.sharding import Layout


class Unembedding(nnx.Module):
    """A matrix [D, V]; where embeddings are tied, the embedding transposed."""

    def __init__(self, config: ModelConfig, matrix: jax.Array | None, layout: Layout):
        if matrix is not None:
            self.matrix = nnx.Param(matrix)
        self.vocab_size = config.vocab_size
        self.inputs_last = layout.inputs_last

    def weight(self, table_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The matrix [D, V], sharded as it is stored; `table_VD` serves where there is no own one."""
        if not hasattr(self, "matrix"):
            return table_VD.astype(dtype).T
        return self.matrix[...].T if self.inputs_last else self.matrix[...].astype(dtype)


def logits(x_BTD: jax.Array, matrix_DV: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 scores [B, T, V]. Columns that only pad the vocabulary get the lowest score: never predicted."""
    return without_padding(jnp.einsum("btd,dv->btv", x_BTD, matrix_DV, preferred_element_type=jnp.float32), vocab_size)


def without_padding(scores_BTV: jax.Array, vocab_size: int) -> jax.Array:
    """Scores whose columns that only pad the vocabulary are the lowest."""
    real_V = jnp.arange(scores_BTV.shape[-1]) < vocab_size
    return jnp.where(real_V, scores_BTV, jnp.finfo(jnp.float32).min)
