"""The one table of parameters: what the decoder is made of, before any array exists.

Initialization, sharding, weight decay, export and counting all read it. A parameter's name is its path in the nested
dictionary of weights, joined by dots: `blocks.attention.query`. Parameters of the blocks are stacked over layers.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.config import VOCABULARY_MULTIPLE, ResolvedModelConfig
from model.sharding import UNSHARDED, Layout
from model.trees import nested

# Roles whose initial values are not random.
CONSTANT = ("norm", "bias")


@dataclass(frozen=True)
class Parameter:
    """One parameter: an entry of the table.

    Attributes:
        axes: logical axis name → size, in the array's order.
        fan_in: the axes that the forward pass sums over; empty where it looks up or multiplies elementwise.
        role: embedding, position, matrix, unembedding, norm or bias.
        scale: of the initial values, whose standard deviation is scale/√(product of fan_in); a norm's and a bias's are
            constant at `scale`.
    """

    axes: Mapping[str, int]
    fan_in: tuple[str, ...]
    role: str
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.axes.values())

    @property
    def fan_out(self) -> tuple[str, ...]:
        """The axes of what a product with this parameter yields."""
        return tuple(name for name in self.axes if name not in ("layers", *self.fan_in))

    @property
    def decay(self) -> bool:
        """Whether weight decay applies: to matrices and tables, not to norms and biases."""
        return self.role not in CONSTANT


def padded_vocabulary(config: ResolvedModelConfig) -> int:
    """Rows of the embedding (V): the vocabulary up to a fixed multiple, so that any mesh can share it."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_table(config: ResolvedModelConfig) -> dict[str, Parameter]:
    """Every parameter of the decoder by its dotted name.

    What the embedding puts on the residual stream has deviation one a component, or 1/√D where its transpose is to give
    logits of variance one; learned positions start at half of that (the proportion of GPT-2, Radford et al. 2019).
    Matrices start at 1/√fan_in. The two of a pre-norm block that write to the residual stream start lower by √(2L)
    (GPT-2 again) and by the embedding's deviation, so that what all blocks add is no more than what the embedding put
    there. Norms start as the identity, biases at zero.
    """
    c = config
    layers = {"layers": c.num_layers}
    model, feedforward = {"model": c.model_dim}, {"feedforward": c.feedforward_dim}
    heads, kv_heads, head = {"heads": c.num_heads}, {"kv_heads": c.num_kv_heads}, {"head": c.head_dim}
    vocabulary = {"vocabulary": padded_vocabulary(c)}
    width = {"width": c.model_dim}
    table_deviation = 1 / math.sqrt(c.model_dim) if c.tie_embeddings or c.scale_embeddings else 1.0
    stream = table_deviation * (math.sqrt(c.model_dim) if c.scale_embeddings else 1.0)
    residual = stream / math.sqrt(2 * c.num_layers) if c.norm_placement == "pre" else 1.0

    def norm(name: str, axes: dict[str, int]) -> dict[str, Parameter]:
        found = {f"{name}.scale": Parameter(axes, (), "norm")}
        return found | ({f"{name}.bias": Parameter(axes, (), "bias", 0.0)} if c.norm == "layernorm" else {})

    def linear(
        name: str, inputs: dict[str, int], outputs: dict[str, int], bias: bool, scale: float = 1.0
    ) -> dict[str, Parameter]:
        found = {name: Parameter(layers | inputs | outputs, tuple(inputs), "matrix", scale)}
        # A vector of the model's width is stored whole.
        own = layers | (width if outputs is model else outputs)
        return found | ({f"{name}_bias": Parameter(own, (), "bias", 0.0)} if bias else {})

    def head_norm(name: str) -> dict[str, Parameter]:
        return {f"blocks.attention.{name}_norm.scale": Parameter(layers | head, (), "norm")} if c.qk_norm else {}

    table = {"embedding.table": Parameter(vocabulary | model, (), "embedding", table_deviation)}
    if c.position == "learned":
        assert c.max_positions
        table["position.table"] = Parameter({"positions": c.max_positions} | model, (), "position", stream / 2)
    table |= norm("blocks.attention_norm", layers | width)
    table |= linear("blocks.attention.query", model, heads | head, c.attention_bias)
    table |= linear("blocks.attention.key", model, kv_heads | head, c.attention_bias)
    table |= linear("blocks.attention.value", model, kv_heads | head, c.attention_bias)
    table |= head_norm("query") | head_norm("key")
    table |= linear("blocks.attention.output", heads | head, model, c.attention_bias, residual)
    table |= norm("blocks.feedforward_norm", layers | width)
    if c.gated:
        table |= linear("blocks.feedforward.gate", model, feedforward, c.feedforward_bias)
    table |= linear("blocks.feedforward.up", model, feedforward, c.feedforward_bias)
    table |= linear("blocks.feedforward.down", feedforward, model, c.feedforward_bias, residual)
    if c.norm_placement == "pre":
        table |= norm("norm", width)
    if not c.tie_embeddings:
        table["unembedding.matrix"] = Parameter(model | vocabulary, ("model",), "unembedding")
    return table


def count_parameters(config: ResolvedModelConfig) -> int:
    """Parameters of the model, without the padding of the vocabulary."""
    padding = padded_vocabulary(config) - (config.vocab_size or 0)
    table = parameter_table(config)
    total = sum(math.prod(p.shape) for p in table.values())
    return total - padding * sum(config.model_dim for p in table.values() if "vocabulary" in p.axes)


def initial_weights(config: ResolvedModelConfig, seed: int, layout: Layout = UNSHARDED) -> dict[str, Any]:
    """Fresh float32 weights, each made in place in its shards; the same bits on every mesh.

    Values are uniform within ±√3 deviations. A parameter's key depends on the seed and its name alone, so adding one
    leaves the others as they were.
    """

    def initial(name: str, p: Parameter) -> jax.Array:
        sharding = layout.out_sharding(*p.axes)
        if p.role in CONSTANT:
            return jnp.full(p.shape, p.scale, jnp.float32, out_sharding=sharding)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        deviation = p.scale / math.sqrt(math.prod(p.axes[axis] for axis in p.fan_in))
        bits = jax.random.bits(key, p.shape, jnp.uint32, out_sharding=sharding)
        # An odd number within ±2²⁴ is exact in float32, so one product is all that rounds, on any device.
        whole = 2 * (bits >> 8).astype(jnp.int32) + 1 - 2**24
        return whole.astype(jnp.float32) * (math.sqrt(3) * deviation / 2**24)

    return nested({name: initial(name, p) for name, p in parameter_table(config).items()})
