"""The copy of a model's weights that decoding reads."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.backend import platform
from model.config import ResolvedModelConfig
from model.cpu import quantized
from model.parameters import Parameter, parameter_table
from model.trees import nested

# The roles of parameters that are multiplied with activations.
QUANTIZED = ("matrix", "unembedding")


@partial(jax.jit, static_argnums=(0, 2))
def decoding_weights(config: ResolvedModelConfig, weights: Mapping[str, Any], int8: bool = False) -> dict[str, Any]:
    """Returns a copy of the weights for `CachedDecoder`, in the compute dtype but for norms.

    "blocks" is a list with the arrays of each layer, so that no decode step slices them out of a stack. On CPUs the
    contracted axes of each matrix come last: see `model.cpu.column_product`.

    Args:
        int8: on one CPU, matrices are whole numbers with a scale (`model.cpu.quantized`). A tied embedding table is
            there in both forms: its rows are looked up as they are, and multiplied as whole numbers.
    """
    table = nested(parameter_table(config))
    on_cpu = platform() == "cpu"

    def convert(parameter: Parameter, array: jax.Array) -> jax.Array:
        if jax.sharding.get_abstract_mesh().size == 1:
            array = jax.reshard(array, PartitionSpec())
        if on_cpu and parameter.role in QUANTIZED:
            axes = [axis for axis in parameter.axes if axis != "layers"]
            array = jnp.transpose(array, sorted(range(len(axes)), key=lambda i: axes[i] in parameter.fan_in))
        return array if parameter.role == "norm" else array.astype(config.compute_dtype)

    def convert_all(parameters: Any, arrays: Any) -> Any:
        """Converts the nested dictionary of a floor."""
        if isinstance(arrays, Mapping):
            converted = {name: convert_all(parameters[name], arrays[name]) for name in arrays}
            matrices = [name for name in arrays if int8 and getattr(parameters[name], "role", None) in QUANTIZED]
            for name in matrices:
                whole = quantized(converted[name], len(parameters[name].fan_in))
                converted[name], converted[f"{name}_scale"] = whole
            return converted
        return convert(parameters, arrays)

    layers = [jax.tree.map(lambda array, i=i: array[i], weights["blocks"]) for i in range(config.num_layers)]
    decoding = convert_all(table, {name: weights[name] for name in weights if name != "blocks"})
    if int8 and config.tie_embeddings:
        matrix, scale = quantized(decoding["embedding"]["table"], 1)
        decoding["unembedding"] = {"matrix": matrix, "matrix_scale": scale}
    return decoding | {"blocks": [convert_all(table["blocks"], layer) for layer in layers]}
