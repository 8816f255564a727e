"""The copy of a model's weights that decoding reads."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.backend import platform
from model.config import ResolvedModelConfig
from model.parameters import Parameter, parameter_table
from model.trees import nested


@partial(jax.jit, static_argnums=0)
def decoding_weights(config: ResolvedModelConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the weights for `CachedDecoder`, in the compute dtype but for norms.

    "blocks" is a list with the arrays of each layer, so that no decode step slices them out of a stack. On CPUs the
    contracted axes of each matrix come last: see `model.cpu.column_product`.
    """
    table = nested(parameter_table(config))
    on_cpu = platform() == "cpu"

    def convert(parameter: Parameter, array: jax.Array) -> jax.Array:
        if on_cpu and parameter.role in ("matrix", "unembedding"):
            axes = [axis for axis in parameter.axes if axis != "layers"]
            array = jnp.transpose(array, sorted(range(len(axes)), key=lambda i: axes[i] in parameter.fan_in))
        return array if parameter.role == "norm" else array.astype(config.compute_dtype)

    def layer(i: int) -> dict[str, Any]:
        return jax.tree.map(lambda parameter, array: convert(parameter, array[i]), table["blocks"], weights["blocks"])

    others = {name: jax.tree.map(convert, table[name], weights[name]) for name in weights if name != "blocks"}
    return others | {"blocks": [layer(i) for i in range(config.num_layers)]}
