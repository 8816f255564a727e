"""Floor 1, token embedding: each token id becomes a vector."""

from collections.abc import Mapping

import jax
from flax import nnx

from model.config import ModelConfig
from model.sharding import Layout


class Embedding(nnx.Module):
    """A table with a row a token of the vocabulary."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.dtype = config.compute_dtype
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids [B, T] → vectors [B, T, D]. Tensor shards hold D of every row, so the look-up stays local."""
        table_VD = self.layout.gather(self.table[...].astype(self.dtype), None, "lookup")
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=self.layout.sharding("batch", None, "lookup"))
        return self.layout.place(x_BTD, "batch", "sequence", None)
