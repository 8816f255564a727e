"""The kinds of layers in a stack, and the period in which they repeat.

Layers differ in what they attend to, in their positions, and in their feed-forward. Parameters are stacked over the
layers that have them: those of experts over the layers with experts, and those of attention over all.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.backend import on_one_cpu
from model.config import DEFAULT_PATTERN, ResolvedModelConfig

# The most layers that are unrolled on a CPU: the program's size and compile time grow with them.
MOST_UNROLLED = 12


class Rope(NamedTuple):
    """The rotary positions of a layer: the base of their frequencies, and whether `rope_scaling` applies."""

    base: float
    scaled: bool


class LayerKind(NamedTuple):
    """The choices in which layers of one model may differ.

    Attributes:
        window: newest positions that each position attends to, or None for all.
        rope: its rotary positions, or None where it rotates nothing.
        experts: True if its feed-forward is a mixture of experts.
        value_embedding: True if its attention adds a vector of the token to values.
    """

    window: int | None
    rope: Rope | None
    experts: bool = False
    value_embedding: bool = False

    def has(self, part: str) -> bool:
        """True if a layer of this kind has this part of a block's weights."""
        if part == "value_embedding":
            return self.value_embedding
        return part != ("feedforward" if self.experts else "experts")


def layer_kinds(config: ResolvedModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kind of every layer, as `layer_pattern`, `dense_layers` and `value_embedding_every` say."""
    pattern = config.layer_pattern or DEFAULT_PATTERN[config.sliding_window is not None]
    letters = (pattern[i % len(pattern)] for i in range(config.num_layers))
    kinds = [_kind(config, letter, i >= config.dense_layers) for i, letter in enumerate(letters)]
    every = config.value_embedding_every
    has_values = [every is not None and (config.num_layers - 1 - i) % every == 0 for i in range(config.num_layers)]
    return tuple(kind._replace(value_embedding=has) for kind, has in zip(kinds, has_values, strict=True))


def layers_with(config: ResolvedModelConfig, part: str) -> list[int]:
    """Returns the numbers, from 0 on, of the layers that have this part of a block's weights, as they are stacked."""
    return [number for number, kind in enumerate(layer_kinds(config)) if kind.has(part)]


def full_rope(config: ResolvedModelConfig) -> Rope:
    """Returns the rotary positions of layers with full attention."""
    return Rope(config.rope_base, config.rope_scaling != "none")


def _kind(config: ResolvedModelConfig, letter: str, after_dense_layers: bool) -> LayerKind:
    experts = config.num_experts is not None and letter.isupper() and after_dense_layers
    window = config.sliding_window if letter.upper() == "S" else None
    if config.position != "rope" or letter.upper() == "N":
        return LayerKind(window, None, experts)
    if letter.upper() == "S":
        base = config.window_rope_base or config.rope_base
        return LayerKind(window, Rope(base, config.rope_scaling != "none" and config.window_rope_scaling), experts)
    return LayerKind(window, full_rope(config), experts)


def prefix_and_period(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """Returns (prefix, period): behind the first `prefix` layers the kinds repeat in whole periods.

    Their sum, which is the number of layers that a program has, is the least.
    """
    L = len(kinds)
    for size in range(1, L + 1):
        for period in range(1, size + 1):
            prefix = size - period
            if (L - prefix) % period == 0 and all(kinds[i] == kinds[i - period] for i in range(prefix + period, L)):
                return prefix, period
    raise AssertionError("all layers are one period")


def scan_layers(
    layer: Callable[[LayerKind, bool], Callable[[Any, Any], tuple[Any, Any]]],
    x: Any,
    stacked: Mapping[str, Any],
    kinds: tuple[LayerKind, ...],
    unrolls: bool = True,
) -> tuple[Any, Mapping[str, Any]]:
    """`jax.lax.scan` over layers of several kinds: over their periods, after the layers of the prefix one by one.

    On a mesh of one CPU, few layers are unrolled: a scan stacks the activations that each layer leaves for the backward
    pass, which takes a tenth of a CPU's step.

    Args:
        layer: function of a layer's kind, and of whether it is in a loop, to the body of a scan.
        stacked: arrays by part of a block, each stacked over the layers whose kind has it; the body is given those of
            its layer.
        unrolls: whether layers may be unrolled.

    Returns:
        The last x, and the results of the layers by name, each stacked over the layers that have it.
    """
    L = len(kinds)
    prefix, period = prefix_and_period(kinds)
    if unrolls and on_one_cpu() and L <= MOST_UNROLLED:
        prefix = L
    if not prefix and period == 1:
        return jax.lax.scan(layer(kinds[0], True), x, stacked)
    pieces = {part: iter(_split(tree, _sizes(part, kinds, prefix))) for part, tree in stacked.items()}
    results = []
    for kind in kinds[:prefix]:
        of_layer = {part: jax.tree.map(lambda leaf: leaf[0], next(pieces[part])) for part in pieces if kind.has(part)}
        x, result = layer(kind, False)(x, of_layer)
        results.append(jax.tree.map(lambda leaf: leaf[None], result))
    if prefix < L:
        rest = {part: tree for part in pieces for tree in pieces[part]}
        x, result = _scan_periods(layer, x, rest, kinds[prefix : prefix + period])
        results.append(result)
    return x, _by_name(results, jnp.concatenate)


def _sizes(part: str, kinds: tuple[LayerKind, ...], prefix: int) -> list[int]:
    """Returns the sizes in which a part's stack is split: its layers of the prefix one by one, then all others."""
    alone = sum(kind.has(part) for kind in kinds[:prefix])
    rest = sum(kind.has(part) for kind in kinds[prefix:])
    return [1] * alone + [rest] * (rest > 0)


def _split(tree: Any, sizes: list[int]) -> list[Any]:
    """Splits the first axis of all arrays of a tree; unlike the gradient of an index, that of a split is one copy."""
    if len(sizes) == 1:
        return [tree]
    split = jax.tree.map(lambda leaf: jax.lax.split(leaf, sizes), tree)
    return [jax.tree.map(lambda _, parts, i=i: parts[i], tree, split) for i in range(len(sizes))]


def _by_name(results: list[Mapping[str, Any]], join: Callable[..., jax.Array]) -> dict[str, Any]:
    names = dict.fromkeys(name for result in results for name in result)
    having = {name: [result[name] for result in results if name in result] for name in names}
    return {name: jax.tree.map(lambda *leaves: join(leaves), *trees) for name, trees in having.items()}


def _scan_periods(
    layer: Any, x: Any, stacked: Mapping[str, Any], kinds: tuple[LayerKind, ...]
) -> tuple[Any, dict[str, Any]]:
    """Scans over periods; an iteration has the layers of one."""
    bodies = [layer(kind, True) for kind in kinds]
    counts = {part: sum(kind.has(part) for kind in kinds) for part in stacked}

    def one_period(x: Any, of_period: Any) -> tuple[Any, Any]:
        pieces = {part: iter(_split(tree, [1] * counts[part])) for part, tree in of_period.items()}
        results = []
        for kind, body in zip(kinds, bodies, strict=True):
            of_layer = {
                part: jax.tree.map(lambda leaf: leaf[0], next(pieces[part])) for part in pieces if kind.has(part)
            }
            x, result = body(x, of_layer)
            results.append(result)
        return x, _by_name(results, jnp.stack)

    # A reshape would lose the sharding of an array at an axis of size 1.
    cut = lambda leaf, n: leaf[:, None] if n == 1 else leaf.reshape(-1, n, *leaf.shape[1:])
    joined = lambda leaf: leaf[:, 0] if leaf.shape[1] == 1 else leaf.reshape(-1, *leaf.shape[2:])
    periods = {part: jax.tree.map(partial(cut, n=counts[part]), tree) for part, tree in stacked.items()}
    x, results = jax.lax.scan(one_period, x, periods)
    return x, jax.tree.map(joined, results)
