"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434): keys and values are made of a narrow latent.

Later queries need of a position only its latent, and one rotated key that all heads share. The first `rope_dim`
components of each query and key are rotated, the others are made of the latent, which has no positions. r is the width
of a latent, R is `rope_dim`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.attention import Attention
from model.collectives import gather_weight
from model.config import ResolvedModelConfig
from model.linear import Linear
from model.norm import Norm
from model.position import Rotation, rotate
from model.product import product
from model.sharding import Layout


class LatentAttention(Attention):
    """`Attention` whose keys and values are products of the normed latent; queries may have a latent, too."""

    def __init__(
        self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout, linear: type[Linear] = Linear
    ):
        super().__init__(config, weights, layout, linear)
        down, up = ("model", "latent_width"), ("latent", "heads", "head")
        self.has_query_latent = config.query_latent_dim is not None
        if self.has_query_latent:
            self.query_latent = linear("btd,dr->btr", weights, "query_latent", down, layout)
            self.query_latent_norm = Norm(config, weights["query_latent_norm"])
            self.query = linear("btr,rhc->bhtc", weights, "query", up, layout)
        self.latent = linear("btd,dr->btr", weights, "latent", down, layout)
        self.latent_norm = Norm(config, weights["latent_norm"])
        self.rotated_key = linear("btd,dr->btr", weights, "rotated_key", down, layout)
        self.key = linear("btr,rhc->bhtc", weights, "key", up, layout)
        self.value = linear("btr,rhc->bhtc", weights, "value", up, layout)

    def gathered(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the input of the projections, of all positions that the devices which share heads have."""
        # All of them compute the latents, whose gradients they sum.
        return self.layout.reshard(x_BTD, "batch", "time", None)

    def heads(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries and keys [B, H, T, C], and values [B, H, T, value_dim]."""
        q_BHTC = self.queries(x_BTD, rotation)
        latent_BTr, rotated_B1TR = self.latents(x_BTD, rotation)
        k_BHTC = self.key(latent_BTr)
        shape = (*k_BHTC.shape[:3], rotated_B1TR.shape[3])
        sharding = self.layout.out_sharding("batch", "heads", "time", None)
        rotated_BHTR = jnp.broadcast_to(rotated_B1TR, shape, out_sharding=sharding)
        return q_BHTC, jnp.concatenate([rotated_BHTR, k_BHTC], axis=-1), self.value(latent_BTr)

    def queries(self, x_BTD: jax.Array, rotation: Rotation) -> jax.Array:
        """Returns rotated queries [B, H, T, C]."""
        if self.has_query_latent:
            x_BTD = self.query_latent_norm(self.query_latent(x_BTD))
        return rotate(self.scaled(self.query(x_BTD)), rotation)

    def latents(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """Returns the normed latents [B, T, r], and the rotated key of all heads [B, 1, T, R]."""
        return self.latent_norm(self.latent(x_BTD)), rotate(self.rotated_key(x_BTD)[:, None], rotation)


class CachedLatentAttention(LatentAttention):
    """`LatentAttention` over a cache of latents: all heads share the key [R + r], whose last r are also the value.

    Instead of each latent's keys and values, each query and each sum is multiplied with their weights.
    """

    def heads(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, H, T, R + r], and the key and value of all heads, [B, 1, T, R + r] and [B, 1, T, r]."""
        q_BHTC = self.queries(x_BTD, rotation)
        latent_BTr, rotated_B1TR = self.latents(x_BTD, rotation)
        R, r = rotated_B1TR.shape[3], latent_BTr.shape[2]
        of_latents = product("bhtc,rhc->bhtr", q_BHTC[..., R:], self._weight(self.key, q_BHTC))
        q_BHTC = jnp.concatenate([q_BHTC[..., :R], of_latents], axis=-1)
        # Attention divides by the root of a wider query's width.
        widening = ((R + r) / self.config.head_dim) ** 0.5
        q_BHTC = (q_BHTC.astype(jnp.float32) * widening).astype(q_BHTC.dtype)
        latent_B1Tr = latent_BTr[:, None]
        return q_BHTC, jnp.concatenate([rotated_B1TR, latent_B1Tr], axis=-1), latent_B1Tr

    def mixed(self, y_BHTr: jax.Array) -> jax.Array:
        """Returns the weighted sums of values [B, H, T, value_dim], given those of latents."""
        return product("bhtr,rhc->bhtc", y_BHTr, self._weight(self.value, y_BHTr))

    def _weight(self, linear: Linear, x: jax.Array) -> jax.Array:
        """Returns a weight [r, H, C] for products with x."""
        return gather_weight(linear.weight[...].astype(x.dtype), self.layout, "latent", "heads", "head")


def attention_class(config: ResolvedModelConfig, cached: bool = False) -> type[Attention]:
    """Returns the attention of this model; `cached` is for the one over the cache of generation."""
    if config.kv_latent_dim is None:
        return Attention
    return CachedLatentAttention if cached else LatentAttention
