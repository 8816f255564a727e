"""The decoder: embedding, position, L blocks of attention and feed-forward, unembedding."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.attention import Attend, Attention, Aux, Cache, attend, causal_mask, within
from model.backend import on_one_cpu
from model.config import ModelConfig
from model.cpu import WRITTEN_OUT, turned_product, unrolled_scan
from model.dropout import Keys, at, dropout
from model.embedding import Embedding
from model.feedforward import FeedForward
from model.kernels import attention_over
from model.norm import NORMS
from model.position import Position, Rotation
from model.product import weight_gradients_first
from model.sharding import UNSHARDED, Layout
from model.unembedding import Unembedding, logits, without_padding

_names = jax.checkpoint_policies.save_only_these_names


def _offload(*names: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


# What the forward pass leaves for the backward pass beside each layer's input; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    "products": _names("product", "attention"),
    "attention": _names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
    # The same in the host's memory; the last also moves the inputs there.
    "offload_products": _offload("product", "attention"),
    "offload": _offload("residual"),
}


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each added to the residual stream.

    Pre-norm (GPT-2): x + f(norm(x)). Post-norm (Vaswani et al. 2017): norm(x + f(x)).
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], layout: Layout):
        norm = NORMS[config.norm]
        self.attention_norm = norm(config, weights["attention_norm"])
        self.attention = Attention(config, weights["attention"], layout)
        self.feedforward_norm = norm(config, weights["feedforward_norm"])
        self.feedforward = FeedForward(config, weights["feedforward"], layout)
        self.pre = config.norm_placement == "pre"
        self.dropout_rate = config.residual_dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: Rotation,
        attention: Attend,
        cache: Cache | None,
        starts_B: jax.Array | None,
        keys_B: Keys,
    ) -> tuple[jax.Array, Aux]:
        """[B, T, D] → [B, T, D], and what attention tells beside."""
        x_BTD = checkpoint_name(x_BTD, "residual")
        y_BTD = self.attention_norm(x_BTD) if self.pre else x_BTD
        y_BTD, aux = self.attention(y_BTD, rotation, attention, cache, starts_B, at(keys_B, 0))
        x_BTD = x_BTD + dropout(y_BTD, self.dropout_rate, at(keys_B, 1))
        x_BTD = x_BTD if self.pre else self.attention_norm(x_BTD)

        x_BTD, feedforward = weight_gradients_first(x_BTD, self.feedforward)
        y_BTD = feedforward(self.feedforward_norm(x_BTD) if self.pre else x_BTD)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout_rate, at(keys_B, 2))
        return x_BTD if self.pre else self.feedforward_norm(x_BTD), aux

    def watch(
        self, x_BTD: jax.Array, rotation: Rotation, attention: Attend, mask_B1TS: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The same result, and what `Decoder.watch` tells of this layer."""
        y_BTD = self.attention_norm(x_BTD) if self.pre else x_BTD
        largest_logit = self.attention.largest_logit(y_BTD, rotation, mask_B1TS)
        x_BTD, _ = self(x_BTD, rotation, attention, None, None, None)
        rms = jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32))))
        return x_BTD, {"residual_rms": rms, "largest_logit": largest_logit}

    def attention_weights(
        self, x_BTD: jax.Array, rotation: Rotation, attention: Attend, mask_B1TS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The same result, and what `Decoder.attention_weights` tells of this layer."""
        weights_BHTT = self.attention.weights(self.attention_norm(x_BTD) if self.pre else x_BTD, rotation, mask_B1TS)
        return self(x_BTD, rotation, attention, None, None, None)[0], weights_BHTT


class Decoder(nnx.Module):
    """The model over a nested dictionary of weights (see `model.parameters`); it holds no other state.

    Building one costs nothing but time to trace, so a training step builds it from the weights that it is given.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], layout: Layout = UNSHARDED):
        self.config = config
        self.layout = layout
        self.embedding = Embedding(config, weights["embedding"], layout)
        self.position = Position(config, weights.get("position"), layout)
        blocks = weights["blocks"]
        # One block, its weights stacked [L, ...]; where they are prepared for generation, one a layer.
        several = isinstance(blocks, list)
        self.blocks: Any = (
            nnx.List(Block(config, of_layer, layout) for of_layer in blocks)
            if several
            else Block(config, blocks, layout)
        )
        self.norm = NORMS[config.norm](config, weights["norm"]) if config.norm_placement == "pre" else None
        self.unembedding = Unembedding(config, weights.get("unembedding", {}).get("matrix"), layout)

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, keys_B: Keys = None
    ) -> jax.Array:
        """Token ids → the vectors [B, T, D] that predict each position's next token.

        Args:
            tokens_BT: int32 ids.
            positions_BT: int32 places in their documents.
            segment_ids_BT: int32; positions with different numbers do not see each other. All three are in the
                layout's order (see `Layout.spread`), as is the result.
            keys_B: of the rows, where something is to be dropped (see `model.dropout`).
        """
        attention = attention_over(self.config, self.layout, segment_ids_BT)
        return self._run(tokens_BT, positions_BT, attention, keys_B)

    def watch(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> Aux:
        """What to keep an eye on in each layer, float32 [L], of a pass that drops nothing.

        "residual_rms" is the root mean square of what the layer hands on; "largest_logit" is attention's largest.
        """
        found: Aux = self._told(Block.watch, tokens_BT, positions_BT, segment_ids_BT)
        return found

    def attention_weights(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Who looks at whom in each layer and head, float32 [L, B, H, T, T]: a query's weights sum to 1."""
        found: jax.Array = self._told(Block.attention_weights, tokens_BT, positions_BT, segment_ids_BT)
        return found

    def _told(
        self, tell: Callable[..., Any], tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> Any:
        """What a method of `Block` tells of each layer beside its result."""
        attention = attention_over(self.config, self.layout, segment_ids_BT)
        mask_B1TS = causal_mask(segment_ids_BT, self.config.sliding_window, self.layout)
        mask_B1TS = self.layout.place(mask_B1TS, "batch", None, None, None)
        x_BTD, rotation = self.position(self.embedding(tokens_BT), positions_BT)
        structure, stacked = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, weights: nnx.State) -> tuple[jax.Array, Any]:
            told: tuple[jax.Array, Any] = tell(nnx.merge(structure, weights), x_BTD, rotation, attention, mask_B1TS)
            return told

        return jax.lax.scan(layer, x_BTD, stacked)[1]

    def extend(self, tokens_BT: jax.Array, starts_B: jax.Array, cache: list[Cache]) -> tuple[jax.Array, list[Cache]]:
        """As `__call__` for T tokens of one document a row, which follow those that the cache holds of it.

        The weights must be as `model.generation.weights.prepared` makes them, and so must the layout be.

        Args:
            tokens_BT: int32 ids.
            starts_B: int32, the position of each row's first token.
            cache: of every layer "key" and "value", each [B, K, S, C], S the longest context; those of the tokens are
                written to it. Where S is T, it holds nothing before.
        """
        T, S = tokens_BT.shape[1], cache[0]["key"].shape[2]
        positions_BT = starts_B[:, None] + jnp.arange(T)
        if S == T:
            attention = attention_over(self.config, self.layout, jnp.ones_like(tokens_BT))
        else:
            ago_B1TS = positions_BT[:, None, :, None] - jnp.arange(S)
            mask_B1TS = within(ago_B1TS, self.config.sliding_window)
            attention = lambda q, k, v, keys_B: attend(q, k, v, mask_B1TS, self.config.attention_softcap)
        x_BTD, rotation = self.position(self.embedding(tokens_BT), positions_BT)
        extended = []
        for block, of_layer in zip(self.blocks, cache, strict=True):
            x_BTD, of_layer = block(x_BTD, rotation, attention, of_layer, starts_B, None)
            extended.append(of_layer)
        return x_BTD if self.norm is None else self.norm(x_BTD), extended

    def _run(self, tokens_BT: jax.Array, positions_BT: jax.Array, attention: Attend, keys_B: Keys = None) -> jax.Array:
        x_BTD, rotation = self.position(self.embedding(tokens_BT), positions_BT)
        x_BTD = dropout(x_BTD, self.config.embedding_dropout, at(keys_B, 0))
        structure, stacked = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, of_layer: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, Aux]:
            weights, number = of_layer
            block = nnx.merge(structure, weights)
            x_BTD, aux = block(x_BTD, rotation, attention, None, None, at(keys_B, number))
            # It lies so already; this says it of its gradient, else each device sums all positions for a bias.
            return self.layout.place(x_BTD, "batch", "sequence", None), aux

        remat = REMAT_POLICIES[self.config.remat_policy]
        if remat:
            layer = jax.checkpoint(layer, policy=remat, prevent_cse=False)
        of_layers = (stacked, jnp.arange(1, self.config.num_layers + 1))
        if on_one_cpu() and self.config.num_layers <= WRITTEN_OUT and not remat:
            x_BTD, _ = unrolled_scan(layer, x_BTD, of_layers)
        else:
            x_BTD, _ = jax.lax.scan(layer, x_BTD, of_layers)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def unembedding_matrix(self) -> jax.Array:
        """The last floor's weight [D, V] in the compute dtype, as it is stored; V is the padded vocabulary."""
        return self.unembedding.weight(self.embedding.table[...], jnp.dtype(self.config.compute_dtype))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores [B, T, V] of every token as the next one. For a whole batch use `model.loss`, which makes none."""
        assert self.config.vocab_size is not None
        x_BTD = self.layout.place(x_BTD, "batch", "time", None)
        matrix_DV = self.layout.gather(self.unembedding_matrix(), "model", "vocabulary")
        if self.layout.inputs_last:
            scores = turned_product("btd,dv->btv", x_BTD, matrix_DV.T, dtype=jnp.float32)
            return without_padding(scores, self.config.vocab_size)
        return logits(x_BTD, matrix_DV, self.config.vocab_size)
