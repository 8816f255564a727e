"""The kinds of layers in a stack, and the period in which they repeat.

Layers differ in what they attend to and in their positions, not in their parameters, which are stacked over all layers.
"""

from collections.abc import Callable
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
    """

    window: int | None
    rope: Rope | None


def layer_kinds(config: ResolvedModelConfig) -> tuple[LayerKind, ...]:
    """Returns the kind of every layer, as `layer_pattern` says."""
    pattern = config.layer_pattern or DEFAULT_PATTERN[config.sliding_window is not None]
    kinds = {letter: _kind(config, letter) for letter in set(pattern)}
    return tuple(kinds[pattern[i % len(pattern)]] for i in range(config.num_layers))


def full_rope(config: ResolvedModelConfig) -> Rope:
    """Returns the rotary positions of layers with full attention."""
    return Rope(config.rope_base, config.rope_scaling != "none")


def _kind(config: ResolvedModelConfig, letter: str) -> LayerKind:
    window = config.sliding_window if letter == "S" else None
    if config.position != "rope" or letter == "N":
        return LayerKind(window, None)
    if letter == "S":
        base = config.window_rope_base or config.rope_base
        return LayerKind(window, Rope(base, config.rope_scaling != "none" and config.window_rope_scaling))
    return LayerKind(window, full_rope(config))


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
    stacked: Any,
    kinds: tuple[LayerKind, ...],
    unrolls: bool = True,
) -> tuple[Any, Any]:
    """`jax.lax.scan` over layers of several kinds: over their periods, after the layers of the prefix one by one.

    On a mesh of one CPU, few layers are unrolled: a scan stacks the activations that each layer leaves for the backward
    pass, which takes a tenth of a CPU's step.

    Args:
        layer: function of a layer's kind, and of whether it is in a loop, to the body of a scan.
        stacked: arrays [L, ...], of which the body is given those of its layer.
        unrolls: whether layers may be unrolled.

    Returns:
        The last x, and the results of all layers, stacked.
    """
    L = len(kinds)
    prefix, period = prefix_and_period(kinds)
    if unrolls and on_one_cpu() and L <= MOST_UNROLLED:
        prefix = L
    if not prefix and period == 1:
        return jax.lax.scan(layer(kinds[0], True), x, stacked)
    # Unlike the gradient of an index, that of a split is a single copy.
    sizes = (1,) * prefix + ((L - prefix,) if prefix < L else ())
    split = jax.tree.map(lambda leaf: jax.lax.split(leaf, sizes), stacked)
    part = lambda number: jax.tree.map(lambda _, parts: parts[number], stacked, split)
    results = []
    for number in range(prefix):
        x, result = layer(kinds[number], False)(x, jax.tree.map(lambda leaf: leaf[0], part(number)))
        results.append(jax.tree.map(lambda leaf: leaf[None], result))
    if prefix < L:
        x, result = _scan_periods(layer, x, part(prefix), kinds[prefix : prefix + period])
        results.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def _scan_periods(layer: Any, x: Any, stacked: Any, kinds: tuple[LayerKind, ...]) -> tuple[Any, Any]:
    """Scans over the periods of layers [n · period, ...]; an iteration has the layers of one."""
    period = len(kinds)
    bodies = [layer(kind, True) for kind in kinds]

    def one_period(x: Any, of_period: Any) -> tuple[Any, Any]:
        split = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * period), of_period)
        results = []
        for i, body in enumerate(bodies):
            x, result = body(x, jax.tree.map(lambda _, parts, i=i: parts[i][0], of_period, split))
            results.append(result)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    periods = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), stacked)
    x, results = jax.lax.scan(one_period, x, periods)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
