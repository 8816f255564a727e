"""Balance among experts: a loss that asks for it, a bias that brings it about, and its figures.

All are of the whole global batch, of all its parts and devices.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.config import ResolvedModelConfig
from model.feedforward.router import Routing
from model.sharding import Layout, as_tuple


def routing_loss(config: ResolvedModelConfig, routing: Routing, load_LE: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """Returns the sum that a part of a batch adds to the balance loss and the z-loss, means over layers and tokens.

    A layer's balance loss is E Σ fₑ pₑ, with fₑ an expert's share of the choices and pₑ its mean score: 1 in perfect
    balance (Fedus et al. 2021, arXiv:2101.03961). With `balance_over` = row, f and p are those of each row, and rows
    count by their tokens (DeepSeek-V3, arXiv:2412.19437).

    Args:
        routing: the part's sums, [L, B, E] and [L, B], of L layers with experts.
        load_LE: the tokens of each expert in the whole batch.
        num_tokens: the number of tokens of the whole batch.
    """
    assert config.num_experts
    E, k = config.num_experts, config.experts_per_token
    if config.balance_over == "batch":
        shares_LE = jax.lax.stop_gradient(load_LE) / (num_tokens * k)
        balance_L = E * jnp.sum(shares_LE * jnp.sum(routing.score_BE, axis=1), axis=1)
    else:
        tokens_LB = jnp.maximum(jnp.sum(routing.load_BE, axis=2) / k, 1)
        products_LB = jnp.sum(routing.load_BE * routing.score_BE, axis=2)
        balance_L = E * jnp.sum(products_LB / (tokens_LB * k), axis=1)
    sums_L = config.balance_loss * balance_L + config.router_z_loss * jnp.sum(routing.z_B, axis=1)
    return jnp.mean(sums_L) / num_tokens


def moved_bias(config: ResolvedModelConfig, balance_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
    """Returns the bias after a batch: a step up where an expert had fewer tokens than the mean, and else down.

    (Wang et al. 2024, arXiv:2408.15664.)
    """
    return balance_LE + config.balance_rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE)


def load_figures(load_LE: jax.Array) -> dict[str, jax.Array]:
    """Returns figures of each layer's load [L] in float32.

    They are "most" and "least", the tokens of the fullest and of the emptiest expert over the mean; "entropy" of the
    shares, over its largest value; and "dead", the number of experts without a token.
    """
    mean_L1 = jnp.maximum(jnp.mean(load_LE, axis=1, keepdims=True), 1e-20)
    shares_LE = load_LE / (mean_L1 * load_LE.shape[1])
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(shares_LE, shares_LE), axis=1) / math.log(load_LE.shape[1])
    return {
        "most": jnp.max(load_LE / mean_L1, axis=1),
        "least": jnp.min(load_LE / mean_L1, axis=1),
        "entropy": entropy_L,
        "dead": jnp.sum(load_LE == 0, axis=1, dtype=jnp.float32),
    }


def load_of_groups(routing: Routing, layout: Layout) -> jax.Array:
    """Returns the tokens of each expert [L, G, E] in each group of rows whose devices share the experts."""
    L, B, E = routing.load_BE.shape
    if not layout.rules:
        return jnp.sum(routing.load_BE, axis=1, keepdims=True)
    shared = as_tuple(layout.rules["experts"])
    between = tuple(mesh for mesh in as_tuple(layout.rules["batch"]) if mesh not in shared)
    # A device adds up its own rows before anything is gathered.
    groups = layout.size("batch") // layout.size("experts")
    cut = PartitionSpec(None, between, shared, None)
    load_LGE = jnp.sum(routing.load_BE.reshape((L, groups, B // groups, E), out_sharding=cut), axis=2)
    return layout.reshard(load_LGE, None, None, None)


def fullest_shard(load_LGE: jax.Array, shards: int) -> jax.Array:
    """Returns the rows of the device whose experts have the most, over the mean of all, [L].

    Args:
        shards: the devices that share the experts.
    """
    L, G, E = load_LGE.shape
    rows_LS = jnp.sum(load_LGE.reshape(L, G * shards, E // shards), axis=2)
    return jnp.max(rows_LS, axis=1) / jnp.maximum(jnp.mean(rows_LS, axis=1), 1e-20)
