"""Floor 1, token embedding: each token id becomes a vector."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.config import ResolvedModelConfig
from model.sharding import Layout, as_tuple


def embedding_lookup(table: jax.Array, ids_BT: jax.Array, layout: Layout) -> jax.Array:
    """Returns the rows [B, T, D] of a table [rows, D] with these ids.

    Each device looks up its part of D, for the positions of all devices that shard D; then all-to-alls exchange parts
    of D for positions. This moves less than gathering the table, and its gradient, would.
    """
    if not layout.rules:
        return _rows(table, ids_BT, None)
    exchange = Exchange.plan(layout, table.shape[1])
    table = exchange.split(table)
    ids_BT = jax.reshard(ids_BT, PartitionSpec(*exchange.specs[0].partitions[:2]))
    x_BTD = _rows(table, ids_BT, exchange.specs[0])
    for spec in exchange.specs[1:]:
        x_BTD = jax.reshard(x_BTD, spec)
    return layout.reshard(x_BTD, "batch", "sequence", None)


class Exchange(NamedTuple):
    """The shardings of a look-up.

    Attributes:
        width: the mesh axes that shard D, the innermost last.
        specs: partitions of the looked-up rows [B, T, D], in sequence. From one to the next a single mesh axis moves
            from D to B or T, which is an all-to-all; if several moved at once, XLA would gather the whole array.
    """

    width: tuple[str, ...]
    specs: tuple[PartitionSpec, ...]

    @classmethod
    def plan(cls, layout: Layout, D: int) -> "Exchange":
        """Returns the look-up over the mesh axes that shard D in storage, and those of "lookup" that divide D."""
        sizes = jax.sharding.get_abstract_mesh().shape
        sharding: list[str] = []
        for mesh in dict.fromkeys((*as_tuple(layout.rules.get("model")), *as_tuple(layout.rules.get("lookup")))):
            if D % math.prod(sizes[name] for name in (*sharding, mesh)) == 0:
                sharding.append(mesh)
        rows, time = as_tuple(layout.rules.get("batch")), as_tuple(layout.rules.get("sequence"))
        kept_B = tuple(itertools.takewhile(lambda mesh: mesh not in sharding, rows))
        kept_T = tuple(itertools.takewhile(lambda mesh: mesh not in sharding, time))
        to_T = tuple(itertools.takewhile(lambda mesh: mesh in sharding, time[len(kept_T) :]))
        to_B = tuple(itertools.takewhile(lambda mesh: mesh in sharding, rows[len(kept_B) :]))
        moves = (*to_T, *to_B)
        width = (*(mesh for mesh in sharding if mesh not in moves), *reversed(moves))
        specs = [PartitionSpec(kept_B, kept_T, width)]
        for count in range(1, len(moves) + 1):
            on_T = to_T[:count]
            on_B = to_B[: max(count - len(to_T), 0)]
            specs.append(PartitionSpec((*kept_B, *on_B), (*kept_T, *on_T), width[: len(width) - count]))
        return cls(width, tuple(specs))

    def split(self, table: jax.Array) -> jax.Array:
        """Returns the table sharded over D alone; its gradient is summed over the mesh axes of B and T."""
        kept_B, kept_T, _ = self.specs[0].partitions
        reduced = frozenset((*as_tuple(kept_B), *as_tuple(kept_T)))
        # Two reshards, so that the backward pass sums before it moves shards: XLA drops contributions of unreduced
        # arrays that it moves (https://github.com/openxla/xla/issues/40034; tests/model/test_workarounds.py).
        table = jax.reshard(table, PartitionSpec(None, self.width))
        return jax.reshard(table, PartitionSpec(None, self.width, reduced=reduced))


def _plain_rows(table: jax.Array, ids_BT: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    return table.at[ids_BT].get(out_sharding=out_sharding)


_rows = jax.custom_vjp(_plain_rows, nondiff_argnums=(2,))


def _forward(table, ids_BT, out_sharding):  # type: ignore[no-untyped-def]
    return _rows(table, ids_BT, out_sharding), (table, ids_BT)


def _backward(out_sharding, operands, gradient_BTD):  # type: ignore[no-untyped-def]
    # The gradient of a frequent token is a sum over thousands of positions, which would stop growing in bfloat16.
    table, ids_BT = operands
    _, pull = jax.vjp(lambda table: _plain_rows(table, ids_BT, out_sharding), table.astype(jnp.float32))
    return pull(gradient_BTD.astype(jnp.float32))[0].astype(table.dtype), None


_rows.defvjp(_forward, _backward)


class Embedding(nnx.Module):
    """A table with a row for each token; its rows may be scaled by √D (Vaswani et al. 2017, section 3.4)."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.scale = math.sqrt(config.model_dim) if config.scale_embeddings else 1.0
        self.dtype = config.compute_dtype
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Maps token ids [B, T] to vectors [B, T, D]."""
        return embedding_lookup(self.table[...].astype(self.dtype), tokens_BT, self.layout) * self.scale
