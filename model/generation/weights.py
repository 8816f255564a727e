"""Weights prepared for generation."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.parameters import parameter_table
from model.trees import flattened, nested


@partial(jax.jit, static_argnums=0)
def prepared(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as they are read again for each token: a copy in the compute dtype, for `Layout.inputs_last`.

    Each layer has its own arrays ("blocks" is a list), so that none is cut out of a stack each time, and of each matrix
    the axes that are summed over come last: see `model.cpu.turned_product`.
    """
    table = parameter_table(config)

    def prepare(name: str, array: jax.Array, *stacked: str) -> jax.Array:
        parameter = table[name]
        if parameter.role in ("matrix", "unembedding"):
            axes = [axis for axis in parameter.axes if axis not in stacked]
            array = jnp.transpose(array, sorted(range(len(axes)), key=lambda i: axes[i] in parameter.fan_in))
        return array if parameter.role == "norm" else array.astype(config.compute_dtype)

    def layer(number: int) -> dict[str, Any]:
        flat = flattened(weights["blocks"])
        return nested({name: prepare(f"blocks.{name}", array[number], "layers") for name, array in flat.items()})

    others = flattened({name: branch for name, branch in weights.items() if name != "blocks"})
    found = nested({name: prepare(name, array) for name, array in others.items()})
    return found | {"blocks": [layer(number) for number in range(config.num_layers)]}
