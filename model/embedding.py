"""Floor 1, token embedding: each token id becomes a vector; and the vectors of tokens that attention adds to values."""

import itertools
import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.config import ResolvedModelConfig
from model.linear import Linear
from model.sharding import Layout, as_tuple, split_axis


def embedding_lookup(table: jax.Array, ids_BT: jax.Array, layout: Layout) -> jax.Array:
    """Returns the rows [B, T, D] of a table [rows, D] with these ids.

    Each device looks up its part of D, for the positions of all devices that shard D; then all-to-alls exchange parts
    of D for positions. This moves less than gathering the table, and its gradient, would.
    """
    if not layout.rules:
        return _rows(table, ids_BT, None)
    specs = _lookup_specs(layout, table.shape[1])
    on_B, on_T, on_D = map(as_tuple, specs[0].partitions)
    # Two reshards, so that the backward pass sums before it moves shards: XLA drops contributions of unreduced arrays
    # that it moves (https://github.com/openxla/xla/issues/40034; tests/model/test_workarounds.py).
    table = jax.reshard(table, PartitionSpec(None, on_D))
    table = jax.reshard(table, PartitionSpec(None, on_D, reduced=frozenset((*on_B, *on_T))))
    x_BTD = _rows(table, jax.reshard(ids_BT, PartitionSpec(on_B, on_T)), specs[0])
    for spec in specs[1:]:
        x_BTD = jax.reshard(x_BTD, spec)
    return layout.reshard(x_BTD, "batch", "sequence", None)


def _lookup_specs(layout: Layout, D: int) -> list[PartitionSpec]:
    """Returns the partitions of looked-up rows [B, T, D], in sequence.

    First D is sharded over its mesh axes in storage, and those of "lookup" that divide it. From one to the next a
    single mesh axis moves from D to B or T, an all-to-all; if several moved at once, XLA would gather the whole array.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    model, lookup, rows, time = (as_tuple(layout.rules.get(name)) for name in ("model", "lookup", "batch", "sequence"))
    sharding: list[str] = []
    for mesh in dict.fromkeys((*model, *lookup)):
        if D % math.prod(sizes[name] for name in (*sharding, mesh)) == 0:
            sharding.append(mesh)
    on_B = tuple(itertools.takewhile(lambda mesh: mesh not in sharding, rows))
    on_T = tuple(itertools.takewhile(lambda mesh: mesh not in sharding, time))
    to_T = tuple(itertools.takewhile(lambda mesh: mesh in sharding, time[len(on_T) :]))
    to_B = tuple(itertools.takewhile(lambda mesh: mesh in sharding, rows[len(on_B) :]))
    moves = (*to_T, *to_B)
    on_D = (*(mesh for mesh in sharding if mesh not in moves), *reversed(moves))
    specs = [PartitionSpec(on_B, on_T, on_D)]
    for count in range(1, len(moves) + 1):
        moved_T, moved_B = to_T[:count], to_B[: max(count - len(to_T), 0)]
        specs.append(PartitionSpec((*on_B, *moved_B), (*on_T, *moved_T), on_D[: len(on_D) - count]))
    return specs


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table: jax.Array, ids_BT: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    return table.at[ids_BT].get(out_sharding=out_sharding)


def _forward(table, ids_BT, out_sharding):  # type: ignore[no-untyped-def]
    return _rows(table, ids_BT, out_sharding), (table, ids_BT)


def _backward(out_sharding, operands, gradient_BTD):  # type: ignore[no-untyped-def]
    # The gradient of a frequent token is a sum over thousands of positions, which would stop growing in bfloat16.
    table, ids_BT = operands
    look_up = lambda table: table.at[ids_BT].get(out_sharding=out_sharding)
    _, pull = jax.vjp(look_up, table.astype(jnp.float32))
    return pull(gradient_BTD.astype(jnp.float32))[0].astype(table.dtype), None


_rows.defvjp(_forward, _backward)


class Embedding(nnx.Module):
    """A table with a row for each token; its rows may be scaled, as by √D (Vaswani et al. 2017, section 3.4).

    With `smear` a token's vector is e + λ σ(w·e) e₋, where e₋ is the vector of the token before it in its document
    (modded-nanogpt, https://github.com/KellerJordan/modded-nanogpt, whose w reads the first 12 components of e).
    """

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.smear = nnx.Param(weights["smear"]) if config.smear else None
        self.smear_gate = nnx.Param(weights["smear_gate"]) if config.smear else None
        self.scale = (math.sqrt(config.model_dim) if config.scale_embeddings else 1.0) * config.embedding_multiplier
        self.dtype = config.compute_dtype
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array, previous_BT: jax.Array | None = None) -> jax.Array:
        """Maps token ids [B, T], and for `smear` their `previous_tokens`, to vectors [B, T, D]."""
        look_up = lambda ids_BT: embedding_lookup(self.table[...].astype(self.dtype), ids_BT, self.layout) * self.scale
        x_BTD = look_up(tokens_BT)
        if self.smear is None or self.smear_gate is None:
            return x_BTD
        assert previous_BT is not None
        # By its id, because the position before may be on another device.
        before_BTD = look_up(jnp.maximum(previous_BT, 0)).astype(jnp.float32)
        logits_BT1 = jnp.sum(x_BTD.astype(jnp.float32) * self.smear_gate[...], axis=-1, keepdims=True)
        has_previous_BT = self.layout.reshard(previous_BT >= 0, "batch", "sequence")
        gate_BT1 = jnp.where(has_previous_BT[..., None], self.smear[...] * jax.nn.sigmoid(logits_BT1), 0.0)
        return (x_BTD.astype(jnp.float32) + gate_BT1 * before_BTD).astype(x_BTD.dtype)


class ValueEmbedding(nnx.Module):
    """A layer's own table of tokens, whose rows attention adds to its values: 2 σ(Wx) v for each key/value head.

    The form is nanochat's (https://github.com/karpathy/nanochat, `nanochat/gpt.py`), where W reads the first components
    of x; modded-nanogpt had the tables first, after value residuals (Zhou et al. 2024, arXiv:2410.17897).
    """

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.table = nnx.Param(weights["table"])
        self.gate = Linear("btd,dk->bkt", weights, "value_gate", ("model", "kv_heads"), layout)
        self.num_kv_heads = config.num_kv_heads
        self.layout = layout

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Returns what is added to the values [B, K, T, C] of tokens; x is the input of attention's products."""
        rows_BTN = embedding_lookup(self.table[...].astype(x_BTD.dtype), tokens_BT, self.layout)
        v_BKTC = jnp.moveaxis(split_axis(rows_BTN, 2, self.num_kv_heads), 2, 1)
        v_BKTC = self.layout.reshard(v_BKTC, "batch", "kv_heads", "time", None)
        return gated(v_BKTC, 2 * jax.nn.sigmoid(self.gate(x_BTD).astype(jnp.float32)))


def gated(x_BHTC: jax.Array, gate_BHT: jax.Array) -> jax.Array:
    """Returns heads' vectors, each multiplied by its float32 factor; the dtype stays the same."""
    return (x_BHTC.astype(jnp.float32) * gate_BHT[..., None]).astype(x_BHTC.dtype)
