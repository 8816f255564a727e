"""The copy of a model's weights that decoding reads."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.backend import platform
from model.config import ResolvedModelConfig
from model.cpu import quantized
from model.layers import layers_with
from model.parameters import parameter_table
from model.trees import flattened, nested

# The roles of parameters that are multiplied with activations.
MULTIPLIED = ("matrix", "unembedding")
# Those of parameters that stay float32.
FLOAT32 = ("norm", "router", "balance", "gate", "scalar")


@partial(jax.jit, static_argnums=(0, 2))
def decoding_weights(config: ResolvedModelConfig, weights: Mapping[str, Any], int8: bool = False) -> dict[str, Any]:
    """Returns a copy of the weights for `CachedDecoder`, in the compute dtype but for norms, sinks, routers and gates.

    "blocks" is a list with the arrays of each layer, so that no decode step slices them out of a stack. On CPUs the
    contracted axes of each matrix come last: see `model.cpu.column_product`.

    Args:
        int8: on one CPU, matrices are whole numbers with a scale (`model.cpu.quantized`). A tied embedding table is
            there in both forms: its rows are looked up as they are, and multiplied as whole numbers.
    """
    table = parameter_table(config)

    def converted(name: str, array: jax.Array) -> dict[str, jax.Array]:
        """Returns the array of one layer, or of another floor, by its name; and its scale."""
        parameter = table[name]
        axes = [axis for axis in parameter.axes if axis != "layers"]
        if jax.sharding.get_abstract_mesh().size == 1:
            array = jax.reshard(array, PartitionSpec())
        if parameter.role in FLOAT32 or name.endswith((".sink", ".router_bias")):
            return {name: array}
        # Latent attention multiplies queries and sums with its weights of keys and values.
        absorbed = config.kv_latent_dim is not None and name in ("blocks.attention.key", "blocks.attention.value")
        if parameter.role in MULTIPLIED and platform() == "cpu" and not absorbed and "experts" not in axes:
            array = jnp.transpose(array, sorted(range(len(axes)), key=lambda i: axes[i] in parameter.fan_in))
            if int8:
                return dict(zip((name, f"{name}_scale"), quantized(array, len(parameter.fan_in)), strict=True))
        return {name: array.astype(config.compute_dtype)}

    arrays = flattened(weights)
    stacked = {name: array for name, array in arrays.items() if "layers" in table[name].axes}
    others = {name: array for name, array in arrays.items() if name not in stacked}
    decoding = nested(_merged(converted(name, array) for name, array in others.items()))
    if int8 and config.tie_embeddings:
        matrix, scale = quantized(decoding["embedding"]["table"], 1)
        decoding["unembedding"] = {"matrix": matrix, "matrix_scale": scale}
    numbers = {name: layers_with(config, name.split(".")[1]) for name in stacked}
    layers = [
        _merged(converted(name, array[numbers[name].index(i)]) for name, array in stacked.items() if i in numbers[name])
        for i in range(config.num_layers)
    ]
    return decoding | {"blocks": [nested(layer)["blocks"] for layer in layers]}


def _merged(dictionaries: Iterable[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    return {name: array for dictionary in dictionaries for name, array in dictionary.items()}
