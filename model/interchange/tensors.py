"""The layout of our parameters in the files of other programs, in both directions.

Ours are stacked over layers and keep heads apart, and the embedding has rows of padding. Theirs are one array for each
layer, of at most two axes, without padding.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.parameters import CONSTANT, Parameter, parameter_table

# Returns one of our parameters by name: one layer, or all of it (layer None) if it is not stacked.
ParameterReader = Callable[[str, int | None], np.ndarray]
# Returns one tensor of a file by name.
TensorReader = Callable[[str], np.ndarray]


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: name in the file, with {layer} if there is one for each layer.
        parameters: the parameters that it holds, concatenated along its last axis.
        transposed: true for a matrix [outputs, inputs] (PyTorch's Linear); ours are [inputs, outputs].
        added: offset that the model adds to its values.
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False
    added: float = 0.0

    @property
    def stacked(self) -> bool:
        """True if there is one for each layer."""
        return "{layer}" in self.name


def linear(name: str, parameter: str) -> Tensor:
    """Describes the weight of a PyTorch Linear."""
    return Tensor(name, (parameter,), transposed=True)


def plain(name: str, *parameters: str) -> Tensor:
    """Describes a vector, a table, or a matrix with our layout."""
    return Tensor(name, parameters)


class TensorMap:
    """The tensors of a model in the files of one family.

    Args:
        config: resolved settings of the widened model.
        tensors: all tensors that the family may have, in the order of its files.
    """

    def __init__(self, config: ResolvedModelConfig, tensors: tuple[Tensor, ...]):
        self.num_layers = config.num_layers
        self.parameters = parameter_table(config)
        self.tensors = [tensor for tensor in tensors if tensor.parameters[0] in self.parameters]
        self._vocab_size = config.vocab_size
        self._of = {name: tensor for tensor in self.tensors for name in tensor.parameters}

    def names(self) -> list[tuple[str, Tensor, int | None]]:
        """Returns (name, tensor, layer) of every array: those before the layers, then layer by layer, then the rest."""
        stacked = [tensor for tensor in self.tensors if tensor.stacked]
        first = self.tensors.index(stacked[0])
        before, after = self.tensors[:first], self.tensors[first + len(stacked) :]
        found: list[tuple[str, Tensor, int | None]] = [(tensor.name, tensor, None) for tensor in before]
        for layer in range(self.num_layers):
            found += [(tensor.name.format(layer=layer), tensor, layer) for tensor in stacked]
        return found + [(tensor.name, tensor, None) for tensor in after]

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of one array."""
        parts = [self._shape(self.parameters[name]) for name in tensor.parameters]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        return shape[::-1] if tensor.transposed else shape

    def write(self, tensor: Tensor, layer: int | None, read: ParameterReader) -> np.ndarray:
        """Makes one array of the file from our parameters."""
        parts = []
        for name in tensor.parameters:
            parameter = self.parameters[name]
            array = read(name, layer)
            array = array[tuple(slice(self._size(axis, size)) for axis, size in _own_axes(parameter).items())]
            parts.append(array.reshape(self._shape(parameter)))
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        if tensor.added:
            whole = whole - np.asarray(tensor.added, whole.dtype)
        return np.ascontiguousarray(whole.T if tensor.transposed else whole)

    def read(self, name: str, layer: int | None, read: TensorReader) -> np.ndarray:
        """Reads one of our parameters, float32, from the arrays of the file."""
        tensor, parameter = self._of[name], self.parameters[name]
        array = read(tensor.name.format(layer=layer))
        assert array.shape == self.shape(tensor)
        array = array.T if tensor.transposed else array
        start = sum(
            self._shape(self.parameters[other])[-1] for other in tensor.parameters[: tensor.parameters.index(name)]
        )
        array = array[..., start : start + self._shape(parameter)[-1]].astype(np.float32)
        if tensor.added:
            array = array + np.float32(tensor.added)
        axes = _own_axes(parameter)
        array = array.reshape([self._size(axis, size) for axis, size in axes.items()])
        return np.pad(array, [(0, size - self._size(axis, size)) for axis, size in axes.items()])

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Returns one layer of a parameter as [inputs, outputs], a vector, or a table, without padding."""
        sizes = {axis: self._size(axis, size) for axis, size in _own_axes(parameter).items()}
        if parameter.fan_in:
            inputs = math.prod(sizes[axis] for axis in parameter.fan_in)
            return inputs, math.prod(sizes.values()) // inputs
        return (math.prod(sizes.values()),) if parameter.role in CONSTANT else tuple(sizes.values())

    def _size(self, axis: str, size: int) -> int:
        return self._vocab_size or 0 if axis == "vocabulary" else size


def _own_axes(parameter: Parameter) -> Mapping[str, int]:
    """Returns the axes of one layer of a parameter."""
    return {axis: size for axis, size in parameter.axes.items() if axis != "layers"}
