"""Floor 5, linear + softmax: each position's vector becomes a score for every token that may come next.

The softmax itself is in `model.loss` (training, evaluation) and `model.generation` (sampling): both take these logits.
In a reward model a `RewardHead` has this place.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from model.collectives import gather_weight
from model.config import ResolvedModelConfig
from model.sharding import Layout


class Unembedding(nnx.Module):
    """A matrix [D, V]; with tied embeddings, the embedding table transposed."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array] | None, layout: Layout):
        self.matrix = nnx.Param(weights["matrix"]) if weights else None
        self.config = config
        self.layout = layout

    def __call__(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """Returns `logits` [B, T, V]; `table_VD` is the embedding table."""
        x_BTD = self.layout.reshard(x_BTD, "batch", "time", None)
        matrix_DV = gather_weight(self.weight(table_VD), self.layout, "model", "vocabulary")
        return logits(x_BTD, matrix_DV, self.config)

    def weight(self, table_VD: jax.Array) -> jax.Array:
        """Returns the matrix [D, V] in the compute dtype, sharded as it is stored; V is the padded vocabulary."""
        dtype = self.config.compute_dtype
        return table_VD.astype(dtype).T if self.matrix is None else self.matrix[...].astype(dtype)


class RewardHead(nnx.Module):
    """A linear map without bias, [D, 1], of a position's vector to a score of the text up to there."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.head = nnx.Param(weights["head"])
        self.config = config
        self.layout = layout

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns float32 scores [B, T]. Products and sums are float32, whatever the compute dtype."""
        score_BT = jnp.sum(x_BTD.astype(jnp.float32) * self.head[...][:, 0], axis=-1)
        return self.layout.reshard(score_BT, "batch", "time")


def logits(x_BTD: jax.Array, matrix_DV: jax.Array, config: ResolvedModelConfig) -> jax.Array:
    """Returns float32 scores [B, T, V]; the padding of the vocabulary is never predicted."""
    return finished(jnp.einsum("btd,dv->btv", x_BTD, matrix_DV, preferred_element_type=jnp.float32), config)


def finished(products_BTV: jax.Array, config: ResolvedModelConfig) -> jax.Array:
    """Returns the scores of products with the matrix: scaled, capped, the lowest where columns pad the vocabulary."""
    scores_BTV = products_BTV if config.logit_multiplier == 1 else products_BTV * config.logit_multiplier
    if config.logit_softcap is not None:
        scores_BTV = config.logit_softcap * jnp.tanh(scores_BTV / config.logit_softcap)
    if scores_BTV.shape[-1] == config.vocab_size:
        return scores_BTV
    real_V = jnp.arange(scores_BTV.shape[-1]) < config.vocab_size
    return jnp.where(real_V, scores_BTV, jnp.finfo(jnp.float32).min)


def slope_of_products(slope_BTV: jax.Array, scores_BTV: jax.Array, config: ResolvedModelConfig) -> jax.Array:
    """Returns the gradient by the products, given that by the scores and the scores: the derivative of `finished`."""
    if config.logit_softcap is not None:
        # The scores of the padding are beyond the cap.
        slope_BTV = slope_BTV * jnp.maximum(1 - jnp.square(scores_BTV / config.logit_softcap), 0)
    return slope_BTV if config.logit_multiplier == 1 else slope_BTV * config.logit_multiplier
