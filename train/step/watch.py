"""Figures of each layer that change before a loss diverges: activations, logits, gradients and updates."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.context_parallel import to_zigzag
from model.decoder import Decoder
from model.parameters import parameter_table
from model.trees import flattened
from train.config.config import ResolvedConfig
from train.devices.rules import training_layout


def watch(
    config: ResolvedConfig, weights: Any, parts: Mapping[str, jax.Array], gradients: Any, updates: Any
) -> dict[str, Any]:
    """Returns the figures of `train.watch_every_steps` in float32; L is the number of layers.

    They are "residual_rms" and "largest_logit" [L] (see `Decoder.watch`), and by parameter name "grad_norm" before
    clipping and "update_ratio", ‖Δw‖/‖w‖ (0 for a weight that is all zero): [L] for parameters stacked over layers.
    """

    def watch_part(part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        layout = training_layout(config.mesh)
        decoder = Decoder(config.model, weights, layout)
        return decoder.watch(*(to_zigzag(part[name], layout) for name in ("tokens", "positions", "segment_ids")))

    watched_AL = jax.lax.map(watch_part, parts)
    weight_norms = norms(config, weights)
    update_norms = norms(config, updates)
    return {
        "residual_rms": jnp.sqrt(jnp.mean(jnp.square(watched_AL["residual_rms"]), axis=0)),
        "largest_logit": jnp.max(watched_AL["largest_logit"], axis=0),
        "grad_norm": norms(config, gradients),
        "update_ratio": {
            name: jnp.where(size > 0, update_norms[name] / jnp.where(size > 0, size, 1), 0)
            for name, size in weight_norms.items()
        },
    }


def norms(config: ResolvedConfig, tree: Any) -> dict[str, jax.Array]:
    """Returns each parameter's norm by name; [L] for parameters that are stacked over layers."""
    table = parameter_table(config.model)
    flat = flattened(tree)

    def norm(name: str) -> jax.Array:
        x = flat[name].astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range("layers" in table[name].axes, x.ndim))))

    return {name: norm(name) for name in table}


def compact(watched: Mapping[str, Any]) -> str:
    """Formats one log line with the extremes and their places; a value that is not finite is the most extreme."""
    logits = watched["largest_logit"]
    rms = watched["residual_rms"]
    extreme = lambda x: x if math.isfinite(x) else math.inf
    layer = logits.index(max(logits, key=extreme))
    by_place = {
        f"{name}, layer {i}" if isinstance(value, list) else name: x
        for name, value in watched["update_ratio"].items()
        for i, x in enumerate(value if isinstance(value, list) else [value])
    }
    place = max(by_place, key=lambda name: extreme(by_place[name]))
    low = min(rms, key=extreme)
    high = max(rms, key=extreme)
    load = watched.get("experts")
    experts = f"  fullest expert {max(load['most']):.2f} of the mean" if load else ""
    return (
        f"largest logit {logits[layer]:.1f} (layer {layer})  residual RMS {low:.3g} to {high:.3g}  "
        f"largest update {by_place[place]:.1e} of the weight ({place}){experts}"
    )
