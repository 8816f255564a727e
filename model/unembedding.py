"""Floor 5, linear + softmax: each position's vector becomes a score for every token that may come next.

The softmax itself is in `model.loss` (training, evaluation) and `model.generate` (sampling): both take these logits.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig


class Unembedding(nnx.Module):
    """A matrix [D, V]; where embeddings are tied, the embedding transposed."""

    def __init__(self, config: ModelConfig, matrix_DV: jax.Array | None):
        if matrix_DV is not None:
            self.matrix = nnx.Param(matrix_DV)
        self.vocab_size = config.vocab_size

    def weight(self, table_VD: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The matrix [D, V], sharded as it is stored; `table_VD` serves where there is no own one."""
        own = hasattr(self, "matrix")
        return self.matrix[...].astype(dtype) if own else table_VD.astype(dtype).T


def logits(x_BTD: jax.Array, matrix_DV: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 scores [B, T, V]. Columns that only pad the vocabulary get the lowest score: never predicted."""
    scores = jnp.einsum("btd,dv->btv", x_BTD, matrix_DV, preferred_element_type=jnp.float32)
    real_V = jnp.arange(matrix_DV.shape[1]) < vocab_size
    return jnp.where(real_V, scores, jnp.finfo(jnp.float32).min)
