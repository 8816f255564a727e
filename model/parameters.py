"""The one table of parameters, which exists before any array does.

Initialization, sharding, weight decay, export and counting all read it. A parameter's name is its path in the nested
dictionary of weights, joined by dots: `blocks.attention.query`. Parameters of the blocks are stacked over layers.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from model.config import VOCABULARY_MULTIPLE, ResolvedModelConfig
from model.layers import layers_with
from model.parametrization import size_factors
from model.sharding import UNSHARDED, Layout
from model.trees import nested

# Roles whose initial values are constant.
CONSTANT = ("norm", "bias", "balance", "gate", "scalar")
# Axes over which a parameter is a stack of matrices.
STACKED = ("layers", "experts", "branches")


@dataclass(frozen=True)
class Parameter:
    """One parameter: an entry of the table.

    Attributes:
        axes: logical axis name → size, in the array's order.
        fan_in: the axes that the forward pass sums over; empty for tables, norms, biases and scalars.
        role: embedding, position, matrix, router, unembedding, norm, bias, gate, scalar, or balance, which has no
            gradient.
        scale: the constant at which norms, biases, gates and scalars start; other initial values have the standard
            deviation scale/√(product of fan_in).
    """

    axes: Mapping[str, int]
    fan_in: tuple[str, ...]
    role: str
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(self.axes.values())

    @property
    def fan_out(self) -> tuple[str, ...]:
        """The axes of the result of a product with this parameter."""
        return tuple(name for name in self.axes if name not in (*STACKED, *self.fan_in))

    @property
    def decay(self) -> bool:
        """True where weight decay applies: for matrices and tables, not for norms, biases, gates and scalars."""
        return self.role not in CONSTANT


def padded_vocabulary(config: ResolvedModelConfig) -> int:
    """Returns V, the rows of the embedding: the vocabulary up to a fixed multiple, so that any mesh divides it."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parameter_table(config: ResolvedModelConfig) -> dict[str, Parameter]:
    """Returns every parameter of the decoder by its dotted name.

    The embedding starts with standard deviation 1, or 1/√D where the rows are scaled by √D or the transposed table is
    to give logits of variance one. Learned positions start at half of the embedded tokens' deviation (the proportion of
    GPT-2, Radford et al. 2019). Matrices start at 1/√fan_in. The two of a pre-norm block that write to the residual
    stream start lower by √(2L) (GPT-2, too) and by the embedded tokens' deviation, so that all blocks together add no
    more than the embedding did; with `zero_init_outputs` they start at zero. Norms start as the identity, biases at
    zero. Gates start at zero, so that none depends on its input yet; so does the reward head, so that no answer is
    preferred yet. `model.parametrization` may scale these values.
    """
    c = config
    table_deviation = 1 / math.sqrt(c.model_dim) if c.tie_embeddings or c.scale_embeddings else 1.0
    stream = table_deviation * (math.sqrt(c.model_dim) if c.scale_embeddings else 1.0) * c.embedding_multiplier
    residual = stream / math.sqrt(2 * (c.base_layers or c.num_layers)) if c.norm_placement == "pre" else 1.0
    residual = 0.0 if c.zero_init_outputs else residual
    model, vocabulary = {"model": c.model_dim}, {"vocabulary": padded_vocabulary(c)}
    layers, width = {"layers": c.num_layers}, {"width": c.model_dim}

    table = {"embedding.table": Parameter(vocabulary | model, (), "embedding", table_deviation)}
    if c.smear:
        table["embedding.smear"] = Parameter({}, (), "scalar", 0.0)
        table["embedding.smear_gate"] = Parameter(width, ("width",), "gate", 0.0)
    if c.position == "learned":
        assert c.max_positions
        table["position.table"] = Parameter({"positions": c.max_positions} | model, (), "position", stream / 2)
    if c.residual_scalars:
        table["blocks.scalars.residual"] = Parameter(layers, (), "scalar", 1.0)
        table["blocks.scalars.first"] = Parameter(layers, (), "scalar", 0.0)
    table |= _norm(c, "blocks.attention_norm", layers | width)
    table |= _attention(c, residual)
    if c.value_embedding_every:
        table |= _value_embedding(c)
    if c.norm_placement == "both":
        table |= _norm(c, "blocks.attention_output_norm", layers | width)
    if c.block != "parallel_one_norm":
        table |= _norm(c, "blocks.feedforward_norm", layers | width)
    if layers_with(c, "feedforward"):
        table |= _feedforward(c, residual)
    if layers_with(c, "experts"):
        table |= _experts(c, residual)
    if c.norm_placement == "both":
        table |= _norm(c, "blocks.feedforward_output_norm", layers | width)
    if c.norm_placement != "post":
        table |= _norm(c, "norm", width)
    if c.reward_head:
        # One column, which is not sharded.
        table["unembedding.head"] = Parameter(width | {"choices": 1}, ("width",), "unembedding", 0.0)
    elif not c.tie_embeddings:
        table["unembedding.matrix"] = Parameter(model | vocabulary, ("model",), "unembedding")
    return {name: _at_size(c, name, p) for name, p in table.items()}


def _at_size(c: ResolvedModelConfig, name: str, p: Parameter) -> Parameter:
    """Returns the parameter with initial values as `model.parametrization` says, given those of the base model."""
    offset = float(c.norm_offset) if p.role == "norm" else 0.0
    factor = size_factors(c, name, p.role).initial
    return p if factor == 1 else replace(p, scale=(p.scale + offset) * factor - offset)


def _norm(c: ResolvedModelConfig, name: str, axes: dict[str, int]) -> dict[str, Parameter]:
    scale = {f"{name}.scale": Parameter(axes, (), "norm", 1.0 - c.norm_offset)}
    has_bias = c.norm == "layernorm" and c.norm_bias
    return scale | ({f"{name}.bias": Parameter(axes, (), "bias", 0.0)} if has_bias else {})


def _linear(
    c: ResolvedModelConfig,
    name: str,
    inputs: dict[str, int],
    outputs: dict[str, int],
    bias: bool,
    scale: float = 1.0,
) -> dict[str, Parameter]:
    layers = {"layers": len(layers_with(c, name.split(".")[1]))}
    matrix = {name: Parameter(layers | inputs | outputs, tuple(inputs), "matrix", scale)}
    # A vector of the model's width is not sharded.
    bias_axes = layers | ({"width": c.model_dim} if "model" in outputs else outputs)
    return matrix | ({f"{name}_bias": Parameter(bias_axes, (), "bias", 0.0)} if bias else {})


def _attention(c: ResolvedModelConfig, residual: float) -> dict[str, Parameter]:
    layers, model, head = {"layers": c.num_layers}, {"model": c.model_dim}, {"head": c.head_dim}
    heads, kv_heads = {"heads": c.num_heads}, {"kv_heads": c.num_kv_heads}
    if c.kv_latent_dim is not None:
        return _latent_attention(c, residual)
    table = _linear(c, "blocks.attention.query", model, heads | head, c.attention_bias)
    table |= _linear(c, "blocks.attention.key", model, kv_heads | head, c.attention_bias)
    table |= _linear(c, "blocks.attention.value", model, kv_heads | head, c.attention_bias)
    if c.qk_norm:
        for name, of_heads in (("query", heads), ("key", kv_heads)):
            axes = layers | (of_heads if c.qk_norm_over == "all_heads" else {}) | head
            table[f"blocks.attention.{name}_norm.scale"] = Parameter(axes, (), "norm", 1.0 - c.norm_offset)
    table |= _of_heads(c)
    return table | _linear(c, "blocks.attention.output", heads | head, model, c.attention_output_bias, residual)


def _latent_attention(c: ResolvedModelConfig, residual: float) -> dict[str, Parameter]:
    assert c.kv_latent_dim
    layers, model, heads = {"layers": c.num_layers}, {"model": c.model_dim}, {"heads": c.num_heads}
    queries, latent, value = model, {"latent": c.kv_latent_dim}, {"head": c.value_dim}
    norm = lambda width: Parameter(layers | {"latent_width": width}, (), "norm", 1.0 - c.norm_offset)
    table: dict[str, Parameter] = {}
    if c.query_latent_dim:
        queries = {"latent": c.query_latent_dim}
        width = {"latent_width": c.query_latent_dim}
        table |= _linear(c, "blocks.attention.query_latent", model, width, False)
        table["blocks.attention.query_latent_norm.scale"] = norm(c.query_latent_dim)
    table |= _linear(c, "blocks.attention.query", queries, heads | {"head": c.head_dim}, False)
    table |= _linear(c, "blocks.attention.latent", model, {"latent_width": c.kv_latent_dim}, False)
    table["blocks.attention.latent_norm.scale"] = norm(c.kv_latent_dim)
    table |= _linear(c, "blocks.attention.rotated_key", model, {"latent_width": c.rope_dim}, False)
    table |= _linear(c, "blocks.attention.key", latent, heads | {"head": c.head_dim - c.rope_dim}, False)
    table |= _linear(c, "blocks.attention.value", latent, heads | value, False)
    return table | _of_heads(c) | _linear(c, "blocks.attention.output", heads | value, model, False, residual)


def _of_heads(c: ResolvedModelConfig) -> dict[str, Parameter]:
    """Returns the parameters of each head as a whole."""
    layers, heads = {"layers": c.num_layers}, {"heads": c.num_heads}
    table = {}
    if c.attention_sinks:
        table["blocks.attention.sink"] = Parameter(layers | heads, (), "bias", 0.0)
    if c.attention_gate:
        gate = layers | {"model": c.model_dim} | heads
        table["blocks.attention.head_gate"] = Parameter(gate, ("model",), "gate", 0.0)
    return table


def _value_embedding(c: ResolvedModelConfig) -> dict[str, Parameter]:
    """A table has all key/value heads' vectors of a token, which start as narrow as a row of a matrix (nanochat)."""
    layers = {"layers": len(layers_with(c, "value_embedding"))}
    table = layers | {"vocabulary": padded_vocabulary(c), "model": c.num_kv_heads * c.head_dim}
    gate = layers | {"model": c.model_dim, "kv_heads": c.num_kv_heads}
    return {
        "blocks.value_embedding.table": Parameter(table, (), "embedding", 1 / math.sqrt(c.model_dim)),
        "blocks.value_embedding.value_gate": Parameter(gate, ("model",), "gate", 0.0),
    }


def _feedforward(c: ResolvedModelConfig, residual: float) -> dict[str, Parameter]:
    model, inner = {"model": c.model_dim}, {"feedforward": c.feedforward_dim}
    table = _linear(c, "blocks.feedforward.gate", model, inner, c.feedforward_bias) if c.gated else {}
    table |= _linear(c, "blocks.feedforward.up", model, inner, c.feedforward_bias)
    return table | _linear(c, "blocks.feedforward.down", inner, model, c.feedforward_bias, residual)


def _experts(c: ResolvedModelConfig, residual: float) -> dict[str, Parameter]:
    """The router scores "choices", which are never sharded, and "experts" may be; gate comes before up in "branches".

    The router starts with an eighth of the deviation of other matrices, so that its first scores are alike.
    """
    assert c.num_experts
    layers = {"layers": len(layers_with(c, "experts"))}
    choices, experts = layers | {"choices": c.num_experts}, layers | {"experts": c.num_experts}
    model, inner = {"expert_model": c.model_dim}, {"feedforward": c.expert_dim}
    branches, name = {"branches": 2}, "blocks.experts"
    router = {**layers, "model": c.model_dim, "choices": c.num_experts}
    table = {f"{name}.router": Parameter(router, ("model",), "router", 1 / 8)}
    if c.router_bias:
        table[f"{name}.router_bias"] = Parameter(choices, (), "bias", 0.0)
    if c.balance_bias:
        table[f"{name}.balance"] = Parameter(choices, (), "balance", 0.0)
    table[f"{name}.gate_up"] = Parameter(experts | model | branches | inner, ("expert_model",), "matrix")
    table[f"{name}.down"] = Parameter(experts | inner | model, ("feedforward",), "matrix", residual)
    if c.feedforward_bias:
        table[f"{name}.gate_up_bias"] = Parameter(experts | branches | inner, (), "bias", 0.0)
        table[f"{name}.down_bias"] = Parameter(experts | {"width": c.model_dim}, (), "bias", 0.0)
    if c.shared_expert_dim:
        model, inner = {"model": c.model_dim}, {"feedforward": c.shared_expert_dim}
        table |= _linear(c, f"{name}.shared.gate", model, inner, c.feedforward_bias)
        table |= _linear(c, f"{name}.shared.up", model, inner, c.feedforward_bias)
        table |= _linear(c, f"{name}.shared.down", inner, model, c.feedforward_bias, residual)
        if c.shared_expert_gate:
            table[f"{name}.shared_gate"] = Parameter(layers | {"width": c.model_dim}, (), "router", 1 / 8)
    return table


def count_parameters(config: ResolvedModelConfig, active: bool = False) -> int:
    """Returns the number of parameters, without the padding of the vocabulary.

    Args:
        active: count only those that compute a token: of the experts, `experts_per_token`.
    """
    real = {"vocabulary": config.vocab_size}
    table = [replace(p, axes={a: real.get(a, n) for a, n in p.axes.items()}) for p in parameter_table(config).values()]
    return round(sum(active_elements(config, p) if active else math.prod(p.shape) for p in table))


def parameters_text(config: ResolvedModelConfig) -> str:
    """Returns the number of parameters, and with experts that of those which compute a token, for people."""
    text = f"{count_parameters(config):,}"
    return f"{text} ({count_parameters(config, active=True):,} for a token)" if config.num_experts else text


def active_elements(config: ResolvedModelConfig, parameter: Parameter) -> float:
    """Returns the elements of a parameter that compute a token: of the experts, `experts_per_token`."""
    if "experts" not in parameter.axes:
        return math.prod(parameter.shape)
    return math.prod(parameter.shape) * config.experts_per_token / parameter.axes["experts"]


def initial_weights(config: ResolvedModelConfig, seed: int, layout: Layout = UNSHARDED) -> dict[str, Any]:
    """Returns initial float32 weights, each computed in its shards, with the same bits on every mesh.

    Values are uniform within ±√3 deviations. A parameter's key depends on the seed and its name alone, so that a new
    parameter does not change the others.
    """

    table = parameter_table(config)
    return nested({name: initial_value(name, p, seed, layout) for name, p in table.items()})


def initial_value(name: str, p: Parameter, seed: int, layout: Layout = UNSHARDED) -> jax.Array:
    """Returns the initial values of one parameter, as `initial_weights` does."""
    sharding = layout.out_sharding(*p.axes)
    if p.role in CONSTANT or p.scale == 0:
        return jnp.full(p.shape, p.scale, jnp.float32, out_sharding=sharding)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    deviation = p.scale / math.sqrt(math.prod(p.axes[axis] for axis in p.fan_in))
    bits = jax.random.bits(key, p.shape, jnp.uint32, out_sharding=sharding)
    # An odd number within ±2²⁴ is exact in float32, so that a single product rounds, alike on every device.
    whole = 2 * (bits >> 8).astype(jnp.int32) + 1 - 2**24
    return whole.astype(jnp.float32) * (math.sqrt(3) * deviation / 2**24)
