"""Floor 4, feed-forward: the same network at every position, gated (SwiGLU; Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.product import product
from model.sharding import Layout


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), widths D → F → D."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.gate = nnx.Param(weights["gate"])
        self.up = nnx.Param(weights["up"])
        self.down = nnx.Param(weights["down"])
        self.layout = layout

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, D]."""
        dtype, layout = x_BTD.dtype, self.layout
        w_gate = layout.gather(self.gate[...].astype(dtype), "model", "feedforward")
        w_up = layout.gather(self.up[...].astype(dtype), "model", "feedforward")
        w_down = layout.gather(self.down[...].astype(dtype), "feedforward", "model")

        x_BTD = layout.gather_sequence(x_BTD)
        gate_BTF = checkpoint_name(product("btd,df->btf", x_BTD, w_gate), "product")
        up_BTF = checkpoint_name(product("btd,df->btf", x_BTD, w_up), "product")
        h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        sums_BTD = product("btf,fd->btd", h_BTF, w_down, layout.partial_sums())
        return checkpoint_name(layout.scatter_sequence(sums_BTD), "product")
