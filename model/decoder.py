"""The decoder: embedding, position, L blocks of attention and feed-forward, unembedding."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src.ad_checkpoint import name_p
from jax.ad_checkpoint import checkpoint_name

from model.attention import Attend, Attention, causal_mask
from model.config import ResolvedModelConfig
from model.context_parallel import previous_tokens
from model.dropout import DropoutKeys, dropout, fold_keys
from model.embedding import Embedding, ValueEmbedding
from model.feedforward.dense import FeedForward
from model.feedforward.experts import Experts
from model.feedforward.router import Routing
from model.kernels import attention_over
from model.latent_attention import attention_class
from model.layers import LayerKind, layer_kinds, scan_layers
from model.linear import LINEARS, Linear
from model.memory import gradient_in_memory, in_order
from model.norm import Norm, final_norm, stack_norm
from model.position import Position, Rotation
from model.product import weight_gradients_first
from model.sharding import UNSHARDED, Layout
from model.unembedding import RewardHead, Unembedding

# What a remat policy says of the results of an operation.
Policy = Callable[..., Any]
# Names of the products of attention and of feed-forwards; "attention" is what the heads give.
_PROJECTIONS = ("query_latent", "query", "latent", "rotated_key", "key", "value", "output", "head_gate", "value_gate")
_FEEDFORWARD = ("gate", "up", "down", "experts")


def _save(*names: str) -> Policy:
    """Returns the policy that keeps these results, and the choice of experts."""
    return _with_cudnn(jax.checkpoint_policies.save_only_these_names(*names, "routing"))


def _offload(*names: str) -> Policy:
    """Returns the policy that keeps these results in the host's memory, and the choice of experts in the device's."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=("routing",), names_which_can_be_offloaded=names,
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip
    return _with_cudnn(policy)


def _with_cudnn(policy: Policy) -> Policy:
    """Returns the policy that treats the results of cuDNN's kernel, to which JAX gives no name, as "attention"."""

    def decision(primitive: Any, *arrays: Any, **parameters: Any) -> Any:
        # `name_p` is the primitive of `checkpoint_name`.
        if primitive.name == "dot_product_attention_fwd_wrapper":
            return policy(name_p, name="attention")
        return policy(primitive, *arrays, **parameters)

    return decision


# Policies by what the forward pass keeps for the backward pass, besides each layer's input and the choice of experts;
# the rest is recomputed.
REMAT_POLICIES = {
    "none": None,
    "products": _save("attention", *_PROJECTIONS, *_FEEDFORWARD),
    "projections": _save("attention", *_PROJECTIONS),
    "attention": _save("attention"),
    "full": _save(),
    # These two keep it in the host's memory; "offload" moves the layers' inputs there, and keeps nothing else.
    "offload_products": _offload("attention", *_PROJECTIONS, *_FEEDFORWARD),
    "offload": _offload("residual"),
}
# Results of a layer by name, besides its output.
Results = Mapping[str, Any]


class Inputs(NamedTuple):
    """The arrays that a layer may read besides the residual stream.

    Attributes:
        tokens_BT: token ids of the rows, for value embeddings.
        first_BTD: the first layer's input, for residual scalars.
    """

    tokens_BT: jax.Array
    first_BTD: jax.Array


class ResidualScalars(nnx.Module):
    """r x + s x₀, of the residual stream x and the first layer's input x₀, with a layer's own r and s.

    The scalars are modded-nanogpt's (https://github.com/KellerJordan/modded-nanogpt); nanochat has them, too.
    """

    def __init__(self, weights: Mapping[str, jax.Array]):
        self.residual = nnx.Param(weights["residual"])
        self.first = nnx.Param(weights["first"])

    def __call__(self, x_BTD: jax.Array, first_BTD: jax.Array) -> jax.Array:
        """Returns the sum [B, T, D], computed in float32."""
        x, first = x_BTD.astype(jnp.float32), first_BTD.astype(jnp.float32)
        return (self.residual[...] * x + self.first[...] * first).astype(x_BTD.dtype)


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each a branch f that is added to the residual stream.

    By `norm_placement`: x + f(norm(x)) (pre), norm(x + f(x)) (post), x + norm(f(x)) (output), x + norm(f(norm(x)))
    (both). In a parallel block both branches read the same x.
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        weights: Mapping[str, Any],
        layout: Layout,
        linear: type[Linear] = Linear,
        cached: bool = False,
    ):
        norms = {name: stack_norm(config, weights[name]) for name in weights if name.endswith("norm")}
        self.attention_norm = norms["attention_norm"]
        self.attention_output_norm = norms.get("attention_output_norm")
        self.attention = attention_class(config, cached)(config, weights["attention"], layout, linear)
        values = weights.get("value_embedding")
        self.value_embedding = ValueEmbedding(config, values, layout) if values else None
        self.scalars = ResidualScalars(weights["scalars"]) if "scalars" in weights else None
        self.feedforward_norm = norms.get("feedforward_norm")
        self.feedforward_output_norm = norms.get("feedforward_output_norm")
        floor = Experts if "experts" in weights else FeedForward
        self.feedforward = floor(config, weights["experts" if floor is Experts else "feedforward"], layout, linear)
        self.placement = config.norm_placement
        self.parallel = config.block != "sequential"
        self.dropout_rate = config.residual_dropout
        self.multiplier = config.residual_multiplier

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: Rotation,
        attention: Attend,
        keys_B: DropoutKeys = None,
        counted_BT: jax.Array | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[jax.Array, Results]:
        """Maps [B, T, D] to [B, T, D], and returns what else there is: "routing", of experts with `counted_BT`.

        Layers with residual scalars or a value embedding need `inputs`.
        """
        x_BTD = self.stream(checkpoint_name(in_order(x_BTD), "residual"), inputs)
        y_BTD = self.attention_input(x_BTD)
        y_BTD = self.attention(y_BTD, rotation, attention, fold_keys(keys_B, 0), self._values(inputs))
        y_BTD = self._scaled(y_BTD, self.attention_norm, self.attention_output_norm)
        sum_BTD = x_BTD + dropout(y_BTD, self.dropout_rate, fold_keys(keys_B, 1))
        sum_BTD = self.attention_norm(sum_BTD) if self.placement == "post" else sum_BTD

        # One norm is for both branches if there is no second.
        norm = self.feedforward_norm or self.attention_norm
        read_BTD, feedforward = weight_gradients_first(x_BTD if self.parallel else sum_BTD, self.feedforward)
        sum_BTD = sum_BTD if self.parallel else read_BTD
        y_BTD, results = gradient_in_memory(norm(read_BTD)) if self.placement in ("pre", "both") else read_BTD, {}
        if isinstance(self.feedforward, Experts):
            y_BTD, routing = feedforward(y_BTD, counted_BT)
            results = {"routing": routing} if routing else {}
        else:
            y_BTD = feedforward(y_BTD)
        y_BTD = self._scaled(y_BTD, norm, self.feedforward_output_norm)
        sum_BTD = sum_BTD + dropout(y_BTD, self.dropout_rate, fold_keys(keys_B, 2))
        return norm(sum_BTD) if self.placement == "post" else sum_BTD, results

    def stream(self, x_BTD: jax.Array, inputs: Inputs | None) -> jax.Array:
        """Returns the residual stream that the branches read and add to, given the block's input."""
        if self.scalars is None:
            return x_BTD
        assert inputs
        return self.scalars(x_BTD, inputs.first_BTD)

    def attention_input(self, x_BTD: jax.Array) -> jax.Array:
        """Returns what attention reads of the residual stream."""
        return gradient_in_memory(self.attention_norm(x_BTD)) if self.placement in ("pre", "both") else x_BTD

    def _values(self, inputs: Inputs | None) -> Callable[[jax.Array], jax.Array] | None:
        """Returns a function of attention's input to what is added to its values."""
        if self.value_embedding is None:
            return None
        assert inputs
        return partial(self.value_embedding, inputs.tokens_BT)

    def _scaled(self, y_BTD: jax.Array, norm: Norm, output_norm: Norm | None) -> jax.Array:
        """Returns a branch's output as it is added."""
        if self.placement == "output":
            y_BTD = norm(y_BTD)
        elif output_norm:
            y_BTD = output_norm(y_BTD)
        return y_BTD if self.multiplier == 1 else y_BTD * self.multiplier


class Decoder(nnx.Module):
    """The model over a nested dictionary of weights (see `model.parameters`); it holds no other state.

    Building one takes only time to trace, so a training step builds it from the weights that it is given.
    """

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout = UNSHARDED):
        self.config = config
        self.layout = layout
        self.embedding = Embedding(config, weights["embedding"], layout)
        self.position = Position(config, weights.get("position"), layout)
        # By part of a block the weights of all layers that have it, stacked.
        self.blocks = nnx.data(weights["blocks"])
        self.norm = final_norm(config, weights)
        self.unembedding: Any
        if config.reward_head:
            self.unembedding = RewardHead(config, weights["unembedding"], layout)
        else:
            self.unembedding = Unembedding(config, weights.get("unembedding"), layout)

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, keys_B: DropoutKeys = None
    ) -> jax.Array:
        """Maps token ids to the vectors [B, T, D] that predict each position's next token.

        All three arrays and the result are in the order of `model.context_parallel.zigzag_order`.

        Args:
            tokens_BT: token ids, int32.
            positions_BT: positions in their documents, int32.
            segment_ids_BT: int32; positions with different numbers do not see each other.
            keys_B: keys of the rows for dropout; without them nothing is dropped.
        """
        return self.with_routing(tokens_BT, positions_BT, segment_ids_BT, keys_B)[0]

    def with_routing(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, keys_B: DropoutKeys = None
    ) -> tuple[jax.Array, Routing | None]:
        """Returns the vectors, and what the routers did in all layers with experts, stacked; None without experts."""
        attention = self._attention(segment_ids_BT)
        x_BTD, rotations = self.position(self._embedded(tokens_BT, segment_ids_BT), positions_BT)
        x_BTD = dropout(x_BTD, self.config.embedding_dropout, fold_keys(keys_B, 0))
        inputs = Inputs(tokens_BT, x_BTD)
        counted_BT = segment_ids_BT > 0
        if self.config.num_experts:
            counted_BT = self.layout.reshard(counted_BT, "batch", "sequence")
        remat = REMAT_POLICIES[self.config.remat_policy]

        def layer(kind: LayerKind, in_loop: bool) -> Callable[..., tuple[jax.Array, Results]]:
            def body(x_BTD: jax.Array, weights: Mapping[str, Any]) -> tuple[jax.Array, Results]:
                block, keys = self._block(weights), fold_keys(keys_B, weights["number"])
                x_BTD, results = block(x_BTD, rotations[kind.rope], attention[kind.window], keys, counted_BT, inputs)
                # x already has this sharding; stating it fixes the sharding of its gradient, too. Without it every
                # device would sum the gradients of biases over all positions.
                return in_order(self.layout.reshard(x_BTD, "batch", "sequence", None)), results

            return jax.checkpoint(body, policy=remat, prevent_cse=not in_loop) if remat else body

        numbers = jnp.arange(1, self.config.num_layers + 1)
        stacked = {**self.blocks, "number": numbers}
        x_BTD, results = scan_layers(layer, x_BTD, stacked, layer_kinds(self.config), unrolls=not remat)
        return x_BTD if self.norm is None else self.norm(x_BTD), results.get("routing")

    def _embedded(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        previous = previous_tokens(tokens_BT, segment_ids_BT, self.layout) if self.config.smear else None
        return self.embedding(tokens_BT, previous)

    def _block(self, weights: Mapping[str, Any]) -> Block:
        return Block(self.config, weights, self.layout, LINEARS[self.config.matmul_dtype])

    def _attention(self, segment_ids_BT: jax.Array) -> dict[int | None, Attend]:
        """Returns attention within documents, by the window of a layer's kind."""
        windows = dict.fromkeys(kind.window for kind in layer_kinds(self.config))
        return {window: attention_over(self.config, self.layout, segment_ids_BT, window) for window in windows}

    def watch(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> dict[str, jax.Array]:
        """Returns early signs of divergence in each layer, float32 [L], from a pass without dropout.

        "residual_rms" is the root mean square of the layer's output; "largest_logit" is attention's largest.
        """
        rms_L, logits_L = self._layers_with(Attention.largest_logit, tokens_BT, positions_BT, segment_ids_BT)
        return {"residual_rms": rms_L, "largest_logit": logits_L}

    def attention_weights(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Returns every layer's and head's weights, float32 [L, B, H, T, T]; those of a query sum to 1."""
        return self._layers_with(Attention.weights, tokens_BT, positions_BT, segment_ids_BT)[1]

    def _layers_with(
        self, method: Callable[..., jax.Array], tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the root mean square of each layer's output [L], and the result of a method of its attention."""
        attention = self._attention(segment_ids_BT)
        masks_B1TS = {window: causal_mask(segment_ids_BT, window, self.layout) for window in attention}
        masks_B1TS = {
            window: self.layout.reshard(mask_B1TS, "batch", None, None, None)
            for window, mask_B1TS in masks_B1TS.items()
        }
        x_BTD, rotations = self.position(self._embedded(tokens_BT, segment_ids_BT), positions_BT)
        inputs = Inputs(tokens_BT, x_BTD)

        def layer(kind: LayerKind, _: bool) -> Callable[..., tuple[jax.Array, Results]]:
            def body(x_BTD: jax.Array, weights: Mapping[str, Any]) -> tuple[jax.Array, Results]:
                block, rotation = self._block(weights), rotations[kind.rope]
                y_BTD = block.attention_input(block.stream(x_BTD, inputs))
                result = method(block.attention, y_BTD, rotation, masks_B1TS[kind.window])
                x_BTD, _ = block(x_BTD, rotation, attention[kind.window], inputs=inputs)
                return x_BTD, {"rms": jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)))), "result": result}

            return body

        results = scan_layers(layer, x_BTD, self.blocks, layer_kinds(self.config), unrolls=False)[1]
        return results["rms"], results["result"]

    def unembedding_matrix(self) -> jax.Array:
        """Returns the last floor's weight [D, V]; see `Unembedding.weight`. Models with a reward head have none."""
        matrix_DV: jax.Array = self.unembedding.weight(self.embedding.table[...])
        return matrix_DV

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the scores [B, T, V] of every token as the next one.

        For the loss of a whole batch use `model.loss`, which never holds the logits of all positions.
        """
        logits_BTV: jax.Array = self.unembedding(x_BTD, self.embedding.table[...])
        return logits_BTV

    def scores(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the reward head's float32 score [B, T] of the text up to each position."""
        score_BT: jax.Array = self.unembedding(x_BTD)
        return score_BT
