"""Floor 1, token embedding: each token id becomes a vector."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.sharding import Layout


def look_up(table: jax.Array, rows: str, ids_BT: jax.Array, layout: Layout) -> jax.Array:
    """Rows [B, T, D] of a table [rows, D]. Each device then holds a part of every row, so the look-up stays local."""
    table = layout.gather_table(table, rows)
    x_BTD = _rows(table, ids_BT, layout.sharding("batch", "time", "lookup"))
    return layout.place(x_BTD, "batch", "sequence", None)


def _plain_rows(table: jax.Array, ids_BT: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    return table.at[ids_BT].get(out_sharding=out_sharding)


_rows = jax.custom_vjp(_plain_rows, nondiff_argnums=(2,))


def _forward(table, ids_BT, out_sharding):  # type: ignore[no-untyped-def]
    return _rows(table, ids_BT, out_sharding), (table, ids_BT)


def _backward(out_sharding, kept, gradient_BTD):  # type: ignore[no-untyped-def]
    # A frequent token's gradient is a sum over thousands of positions: in bfloat16 it would stop growing.
    table, ids_BT = kept
    _, pull = jax.vjp(lambda table: _plain_rows(table, ids_BT, out_sharding), table.astype(jnp.float32))
    return pull(gradient_BTD.astype(jnp.float32))[0].astype(table.dtype), None


_rows.defvjp(_forward, _backward)


class Embedding(nnx.Module):
    """A table with a row a token of the vocabulary, scaled by √D where asked (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.scale = math.sqrt(config.model_dim) if config.scale_embeddings else 1.0
        self.dtype = config.compute_dtype
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids [B, T] → vectors [B, T, D]."""
        return look_up(self.table[...].astype(self.dtype), "vocabulary", tokens_BT, self.layout) * self.scale
