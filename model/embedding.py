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
    """Rows [B, T, D] of a table [rows, D].

    Each device looks up its part of D for the positions of all that share D, and they exchange what they find: less
    than the table is, and so are the gradients.
    """
    if not layout.rules:
        return _rows(table, ids_BT, None)
    exchange = Exchange.of(layout, table.shape[1])
    table = exchange.cut(table)
    ids_BT = jax.reshard(ids_BT, PartitionSpec(*exchange.places[0].partitions[:2]))
    x_BTD = _rows(table, ids_BT, exchange.places[0])
    for place in exchange.places[1:]:
        x_BTD = jax.reshard(x_BTD, place)
    return layout.reshard(x_BTD, "batch", "sequence", None)


class Exchange(NamedTuple):
    """How look-ups are shared.

    Attributes:
        width: the mesh axes that share D, the last of which divides it finest.
        places: of what is found, [B, T, D], from there on; one mesh axis moves at a time from D to B or T: an
            all-to-all, where XLA would gather everything for several at once.
    """

    width: tuple[str, ...]
    places: tuple[PartitionSpec, ...]

    @classmethod
    def of(cls, layout: Layout, D: int) -> "Exchange":
        """Over the mesh axes that share the storage of D, and those of "lookup" too as far as D can be divided."""
        sizes = jax.sharding.get_abstract_mesh().shape
        sharing: list[str] = []
        for mesh in dict.fromkeys((*as_tuple(layout.rules.get("model")), *as_tuple(layout.rules.get("lookup")))):
            if D % math.prod(sizes[name] for name in (*sharing, mesh)) == 0:
                sharing.append(mesh)
        rows, time = as_tuple(layout.rules.get("batch")), as_tuple(layout.rules.get("sequence"))
        kept_B = tuple(itertools.takewhile(lambda mesh: mesh not in sharing, rows))
        kept_T = tuple(itertools.takewhile(lambda mesh: mesh not in sharing, time))
        to_T = tuple(itertools.takewhile(lambda mesh: mesh in sharing, time[len(kept_T) :]))
        to_B = tuple(itertools.takewhile(lambda mesh: mesh in sharing, rows[len(kept_B) :]))
        moves = (*to_T, *to_B)
        width = (*(mesh for mesh in sharing if mesh not in moves), *reversed(moves))
        places = [PartitionSpec(kept_B, kept_T, width)]
        for count in range(1, len(moves) + 1):
            on_T, on_B = to_T[:count], to_B[: max(count - len(to_T), 0)]
            places.append(PartitionSpec((*kept_B, *on_B), (*kept_T, *on_T), width[: len(width) - count]))
        return cls(width, tuple(places))

    def cut(self, table: jax.Array) -> jax.Array:
        """All rows of a table, of each the device's part. Its gradient is summed over those that share B or T."""
        kept_B, kept_T, _ = self.places[0].partitions
        reduced = frozenset((*as_tuple(kept_B), *as_tuple(kept_T)))
        # Backward the sums come first: JAX 0.10 loses some of what is moved while it is still to be summed.
        table = jax.reshard(table, PartitionSpec(None, self.width))
        return jax.reshard(table, PartitionSpec(None, self.width, reduced=reduced))


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

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.scale = math.sqrt(config.model_dim) if config.scale_embeddings else 1.0
        self.dtype = config.compute_dtype
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids [B, T] → vectors [B, T, D]."""
        return embedding_lookup(self.table[...].astype(self.dtype), tokens_BT, self.layout) * self.scale
