"""The router of a mixture of experts: it says which experts compute a token, and with what weights.

It works in float32. Of equal scores that of the first expert wins, so a token's experts never depend on the machines.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from model.collectives import gather_weight
from model.config import ResolvedModelConfig
from model.sharding import Layout

# Added to the sum of scores that others are divided by, as in DeepSeek-V3.
LEAST_SUM = 1e-20


class Routing(NamedTuple):
    """A layer's routing of the tokens of each row: sums over its positions, so that parts can be added.

    Attributes:
        load_BE: the tokens of each expert, float32 (whole numbers).
        score_BE: the sum of the scores, normalized over experts; it has a gradient.
        z_B: the sum of log² of the sum of exponentials of the affinities; it has a gradient.
    """

    load_BE: jax.Array
    score_BE: jax.Array
    z_B: jax.Array


class Router(nnx.Module):
    """Chooses k of E experts for each token by the affinities x·W."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout):
        self.config = config
        self.layout = layout
        self.weight = nnx.Param(weights["router"])
        self.bias = nnx.Param(weights["router_bias"]) if "router_bias" in weights else None
        self.balance = nnx.Param(weights["balance"]) if "balance" in weights else None

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None) -> tuple[jax.Array, jax.Array, Routing | None]:
        """Returns the experts' numbers and weights, [B, T, k] each, and the sums of the positions that count."""
        config = self.config
        weight_DE = gather_weight(self.weight[...], self.layout, "model", None)
        if self.layout.rules:
            # Residuals are sharded over more mesh axes than what the other floors multiply.
            tokens = self.layout.mesh_axes("batch", "sequence")
            weight_DE = jax.reshard(weight_DE, PartitionSpec(None, None, reduced=tokens))
        affinities_BTE = jnp.einsum(
            "btd,de->bte", x_BTD.astype(jnp.float32), weight_DE, precision=jax.lax.Precision.HIGHEST
        )
        if self.bias is not None:
            affinities_BTE = affinities_BTE + self.bias[...]
        score = jax.nn.sigmoid if config.router_score == "sigmoid" else jax.nn.softmax
        scores_BTE = score(affinities_BTE)
        by_BTE = affinities_BTE if config.router_score == "softmax_of_chosen" else scores_BTE
        if self.balance is not None:
            by_BTE = by_BTE + self.balance[...]
        # Remat keeps them: were they chosen again, rounding could send the backward pass to other experts.
        ids_BTk = checkpoint_name(self._chosen(jax.lax.stop_gradient(by_BTE)), "routing")
        # By comparison: a gather would not be sharded, and its gradient would be a scatter.
        hot_BTkE = ids_BTk[..., None] == jnp.arange(config.num_experts)
        weights_BTk = self._weights(hot_BTkE, affinities_BTE, scores_BTE)
        if counted_BT is None:
            return ids_BTk, weights_BTk, None
        count_BT1 = counted_BT[..., None].astype(jnp.float32)
        shares_BTE = scores_BTE
        if config.router_score == "sigmoid":
            shares_BTE = scores_BTE / jnp.sum(scores_BTE, -1, keepdims=True)
        z_BT = jnp.square(jax.nn.logsumexp(affinities_BTE, axis=-1)) * count_BT1[..., 0]
        load_BTE = jnp.sum(hot_BTkE, axis=2, dtype=jnp.float32) * count_BT1
        sums = Routing(jnp.sum(load_BTE, 1), jnp.sum(shares_BTE * count_BT1, 1), jnp.sum(z_BT, 1))
        return ids_BTk, weights_BTk, sums

    def _chosen(self, by_BTE: jax.Array) -> jax.Array:
        """Returns the numbers of the k highest, of those in the best groups."""
        config, G = self.config, self.config.router_groups
        if G > 1:
            by_BTGE = by_BTE.reshape(*by_BTE.shape[:2], G, -1)
            # A group counts by its two best together in DeepSeek-V3, and by its best in DeepSeek-V2.
            best = jax.lax.top_k(by_BTGE, 2 if config.router_score == "sigmoid" else 1)[0]
            groups_BTg = jax.lax.top_k(jnp.sum(best, -1), config.router_groups_per_token)[1]
            open_BTG = jnp.any(groups_BTg[..., None] == jnp.arange(G), axis=2)
            by_BTE = jnp.where(open_BTG[..., None], by_BTGE, -jnp.inf).reshape(by_BTE.shape)
        return jax.lax.top_k(by_BTE, config.experts_per_token)[1]

    def _weights(self, hot_BTkE: jax.Array, affinities_BTE: jax.Array, scores_BTE: jax.Array) -> jax.Array:
        chosen = lambda of_BTE: jnp.sum(jnp.where(hot_BTkE, of_BTE[:, :, None], 0.0), axis=-1)
        if self.config.router_score == "softmax_of_chosen":
            weights_BTk = jax.nn.softmax(chosen(affinities_BTE))
        else:
            weights_BTk = chosen(scores_BTE)
            if self.config.router_normalize:
                weights_BTk = weights_BTk / (jnp.sum(weights_BTk, -1, keepdims=True) + LEAST_SUM)
        return weights_BTk * self.config.router_scale
