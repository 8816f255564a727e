"""What a person watches while a model learns: signs, layer by layer, that come before a loss that diverges."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model.decoder import Decoder
from model.parameters import parameter_table
from model.trees import flattened
from train.config.config import Config
from train.devices.rules import training_layout

Watched = dict[str, Any]


def watch(config: Config, weights: Any, parts: Mapping[str, jax.Array], gradients: Any, updates: Any) -> Watched:
    """What `train.watch_every_steps` asks for, float32; [L] is over layers.

    Args:
        config: of the run.
        weights: before the update.
        parts: the batch, [A, B/A, T], to be looked at in A parts.
        gradients: of the loss, before clipping.
        updates: what is added to the weights.

    Returns:
        "residual_rms" and "largest_logit" [L] (see `Decoder.watch`); by the names of the parameters "grad_norm", and
        "update_ratio", ‖Δw‖/‖w‖ (0 where a weight is all zero): [L] of those that are stacked over layers.
    """

    def of_part(part: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        layout = training_layout(config.mesh)
        decoder = Decoder(config.model, weights, layout)
        return decoder.watch(*(layout.spread(part[name]) for name in ("tokens", "positions", "segment_ids")))

    found_AL = jax.lax.map(of_part, parts)
    sizes, changes = norms(config, weights), norms(config, updates)
    return {
        "residual_rms": jnp.sqrt(jnp.mean(jnp.square(found_AL["residual_rms"]), axis=0)),
        "largest_logit": jnp.max(found_AL["largest_logit"], axis=0),
        "grad_norm": norms(config, gradients),
        "update_ratio": {
            name: jnp.where(size > 0, changes[name] / jnp.where(size > 0, size, 1), 0) for name, size in sizes.items()
        },
    }


def norms(config: Config, tree: Any) -> dict[str, jax.Array]:
    """The norm of each parameter by its name; of those that are stacked over layers each layer's, [L]."""
    table, flat = parameter_table(config.model), flattened(tree)

    def norm(name: str) -> jax.Array:
        x = flat[name].astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range("layers" in table[name].axes, x.ndim))))

    return {name: norm(name) for name in table}


def compact(watched: Watched) -> str:
    """One line of a log: the extremes, and where they are; what is not finite is the most extreme."""
    logits, rms = watched["largest_logit"], watched["residual_rms"]
    extreme = lambda x: x if math.isfinite(x) else math.inf
    layer = logits.index(max(logits, key=extreme))
    by_place = {
        f"{name}, layer {i}" if isinstance(value, list) else name: x
        for name, value in watched["update_ratio"].items()
        for i, x in enumerate(value if isinstance(value, list) else [value])
    }
    place = max(by_place, key=lambda name: extreme(by_place[name]))
    low, high = min(rms, key=extreme), max(rms, key=extreme)
    return (
        f"largest logit {logits[layer]:.1f} (layer {layer})  residual RMS {low:.3g} to {high:.3g}  "
        f"largest update {by_place[place]:.1e} of the weight ({place})"
    )
