"""The layout of our parameters in the files of other programs, in both directions.

Our parameters are stacked over layers and keep heads apart, and the embedding has rows of padding. Other programs store
one array for each layer, of at most two axes, without padding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.parameters import CONSTANT, Parameter, parameter_table
from model.trees import flattened, nested

# Returns one layer of a parameter of ours by name, or the whole parameter (layer None) if it is not stacked.
ParameterReader = Callable[[str, int | None], np.ndarray]
# Returns one tensor of a file by name.
TensorReader = Callable[[str], np.ndarray]


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: name in the file, with {layer} if there is one for each layer.
        parameters: the parameters that it holds, concatenated along its last axis.
        transposed: true for a matrix [outputs, inputs] (PyTorch's Linear); ours are [inputs, outputs].
        by_head: the parameters are concatenated head by head.
        pairs: the parameters in which components that are rotated together are adjacent; ours are half of `rope_dim`
            apart.
        rotated_last: the rotated components of each head follow the others; ours are the first.
        requires: a parameter without which a model does not have this tensor.
        without: a parameter with which a model does not have this tensor.
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    pairs: tuple[str, ...] = ()
    rotated_last: bool = False
    requires: str = ""
    without: str = ""


def torch_linear(name: str, *parameters: str) -> Tensor:
    """Describes the weight of a PyTorch Linear."""
    return Tensor(name, parameters, transposed=True)


def same_layout(name: str, *parameters: str) -> Tensor:
    """Describes a vector, a table, or a matrix with our layout."""
    return Tensor(name, parameters)


def reader_of(weights: Mapping[str, Any]) -> ParameterReader:
    """Returns a reader of nested arrays."""
    flat = flattened(weights)
    return lambda name, layer: np.asarray(flat[name] if layer is None else flat[name][layer])


def nested_weights(config: ResolvedModelConfig, read: ParameterReader) -> dict[str, Any]:
    """Returns all parameters of a reader as nested float32 arrays: the inverse of `reader_of`."""
    weights = {}
    for name, parameter in parameter_table(config).items():
        if "layers" not in parameter.axes:
            weights[name] = read(name, None)
            continue
        weights[name] = np.empty(parameter.shape, np.float32)
        for layer in range(config.num_layers):
            weights[name][layer] = read(name, layer)
    return nested(weights)


class TensorMap:
    """The tensors of a widened model in the files of one family, of all `tensors` that the family may have."""

    def __init__(self, config: ResolvedModelConfig, tensors: tuple[Tensor, ...]):
        self.num_layers = config.num_layers
        self.parameters = parameter_table(config)
        self.tensors = [
            tensor
            for tensor in tensors
            if tensor.parameters[0] in self.parameters
            and (not tensor.requires or tensor.requires in self.parameters)
            and tensor.without not in self.parameters
        ]
        self._vocab_size = config.vocab_size
        self._rope_dim = config.rope_dim
        self._tensor_of = {name: tensor for tensor in self.tensors for name in tensor.parameters}

    def arrays(self) -> list[tuple[str, Tensor, int | None]]:
        """Returns (name, tensor, layer) of every array: those before the layers, then layer by layer, then the rest."""
        stacked = [tensor for tensor in self.tensors if "{layer}" in tensor.name]
        first = self.tensors.index(stacked[0])
        layers = [(tensor.name.format(layer=i), tensor, i) for i in range(self.num_layers) for tensor in stacked]
        single = [(tensor.name, tensor, None) for tensor in self.tensors if tensor not in stacked]
        return [*single[:first], *layers, *single[first:]]

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of one array."""
        shapes = [self._shape(self.parameters[name]) for name in tensor.parameters]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return shape[::-1] if tensor.transposed else shape

    def write(self, tensor: Tensor, layer: int | None, read: ParameterReader) -> np.ndarray:
        """Makes one array of the file from our parameters."""
        parts = []
        for name in tensor.parameters:
            parameter = self.parameters[name]
            array = read(name, layer)[tuple(map(slice, self._sizes(parameter).values()))]
            if name in tensor.pairs:
                array = self._swapped_pairs(array, (2, -1))
            if tensor.rotated_last:
                array = np.roll(array, -self._rope_dim, axis=-1)
            parts.append(array if tensor.by_head else array.reshape(self._shape(parameter)))
        array = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        if tensor.by_head:
            array = array.reshape(*array.shape[:-2], -1)
        return np.ascontiguousarray(array.T if tensor.transposed else array)

    def read(self, name: str, layer: int | None, read: TensorReader) -> np.ndarray:
        """Reads one of our parameters, float32, from the arrays of the file."""
        tensor = self._tensor_of[name]
        parameter = self.parameters[name]
        array = read(tensor.name.format(layer=layer))
        assert array.shape == self.shape(tensor)
        array = array.T if tensor.transposed else array
        if tensor.by_head:
            array = array.reshape(
                *array.shape[:-1], next(size for axis, size in parameter.axes.items() if "heads" in axis), -1
            )
        width = lambda other: self._sizes(other)["head"] if tensor.by_head else self._shape(other)[-1]
        before = tensor.parameters[: tensor.parameters.index(name)]
        start = sum(width(self.parameters[other]) for other in before)
        array = array[..., start : start + width(parameter)].astype(np.float32)
        sizes = self._sizes(parameter)
        padding = [(0, parameter.axes[axis] - size) for axis, size in sizes.items()]
        array = np.pad(array.reshape(tuple(sizes.values())), padding)
        if tensor.rotated_last:
            array = np.roll(array, self._rope_dim, axis=-1)
        return self._swapped_pairs(array, (-1, 2)) if name in tensor.pairs else array

    def _swapped_pairs(self, array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Reorders the rotated components of heads [..., C], which have this shape, to its transpose."""
        rotated, rest = np.split(array, [self._rope_dim], axis=-1)
        swapped = rotated.reshape(*rotated.shape[:-1], *shape).swapaxes(-1, -2).reshape(rotated.shape)
        return np.concatenate([swapped, rest], axis=-1)

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Returns the shape of one layer as [inputs, outputs], a vector, or a table, without padding."""
        sizes = self._sizes(parameter)
        if parameter.fan_in:
            inputs = math.prod(sizes[axis] for axis in parameter.fan_in)
            return inputs, math.prod(sizes.values()) // inputs
        return (math.prod(sizes.values()),) if parameter.role in CONSTANT else tuple(sizes.values())

    def _sizes(self, parameter: Parameter) -> dict[str, int]:
        """Returns the axes of one layer, without padding."""
        sizes = {axis: size for axis, size in parameter.axes.items() if axis != "layers"}
        return sizes | ({"vocabulary": self._vocab_size} if "vocabulary" in sizes else {})
