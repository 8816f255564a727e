"""Where our parameters stand in files of other programs, and in which layout: both ways.

Ours are stacked over layers and keep heads apart; the embedding has rows that only pad the vocabulary. Theirs are one
array a layer, of at most two axes, without padding.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.parameters import CONSTANT, Parameter, parameter_table

# Gives one of our parameters, by name, as NumPy has it: of one layer, or whole where it is not stacked (none).
ParameterReader = Callable[[str, int | None], np.ndarray]
# Gives one of theirs.
Theirs = Callable[[str], np.ndarray]


class Tensor(NamedTuple):
    """One tensor of theirs.

    Attributes:
        name: with {layer} where there is one a layer.
        ours: the parameter that it holds, or those that stand in it side by side, along its last axis.
        transposed: whether a matrix is [outputs, inputs] (PyTorch's Linear), where ours is [inputs, outputs].
        added: what the model adds to its values.
    """

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    added: float = 0.0

    @property
    def stacked(self) -> bool:
        """Whether there is one a layer."""
        return "{layer}" in self.name


def linear(name: str, ours: str) -> Tensor:
    """The weight of a PyTorch Linear."""
    return Tensor(name, (ours,), transposed=True)


def plain(name: str, *ours: str) -> Tensor:
    """A vector, a table, or a matrix that is laid out as ours."""
    return Tensor(name, ours)


class TensorMap:
    """The tensors of a model in one family's files.

    Args:
        config: resolved; what its class of theirs has in any case included.
        tensors: all that the family may have, in the order of its files.
    """

    def __init__(self, config: ResolvedModelConfig, tensors: tuple[Tensor, ...]):
        self.num_layers = config.num_layers
        self.parameters = parameter_table(config)
        self.tensors = [tensor for tensor in tensors if tensor.ours[0] in self.parameters]
        self._vocab_size = config.vocab_size
        self._of = {name: tensor for tensor in self.tensors for name in tensor.ours}

    def names(self) -> list[tuple[str, Tensor, int | None]]:
        """(name, tensor, layer) of every array, what is before the layers first, then layer by layer."""
        stacked = [tensor for tensor in self.tensors if tensor.stacked]
        first = self.tensors.index(stacked[0])
        before, after = self.tensors[:first], self.tensors[first + len(stacked) :]
        found: list[tuple[str, Tensor, int | None]] = [(tensor.name, tensor, None) for tensor in before]
        for layer in range(self.num_layers):
            found += [(tensor.name.format(layer=layer), tensor, layer) for tensor in stacked]
        return found + [(tensor.name, tensor, None) for tensor in after]

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Of one array."""
        parts = [self._shape(self.parameters[name]) for name in tensor.ours]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        return shape[::-1] if tensor.transposed else shape

    def write(self, tensor: Tensor, layer: int | None, read: ParameterReader) -> np.ndarray:
        """One array of theirs, from ours."""
        parts = []
        for name in tensor.ours:
            parameter = self.parameters[name]
            array = read(name, layer)
            array = array[tuple(slice(self._size(axis, size)) for axis, size in _own_axes(parameter).items())]
            parts.append(array.reshape(self._shape(parameter)))
        whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        if tensor.added:
            whole = whole - np.asarray(tensor.added, whole.dtype)
        return np.ascontiguousarray(whole.T if tensor.transposed else whole)

    def read(self, name: str, layer: int | None, read: Theirs) -> np.ndarray:
        """One of our parameters, float32, from theirs."""
        tensor, parameter = self._of[name], self.parameters[name]
        array = read(tensor.name.format(layer=layer))
        assert array.shape == self.shape(tensor)
        array = array.T if tensor.transposed else array
        start = sum(self._shape(self.parameters[other])[-1] for other in tensor.ours[: tensor.ours.index(name)])
        array = array[..., start : start + self._shape(parameter)[-1]].astype(np.float32)
        if tensor.added:
            array = array + np.float32(tensor.added)
        axes = _own_axes(parameter)
        array = array.reshape([self._size(axis, size) for axis, size in axes.items()])
        return np.pad(array, [(0, size - self._size(axis, size)) for axis, size in axes.items()])

    def _shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Of one layer of a parameter as [inputs, outputs], a vector, or a table; without padding."""
        sizes = {axis: self._size(axis, size) for axis, size in _own_axes(parameter).items()}
        if parameter.fan_in:
            inputs = math.prod(sizes[axis] for axis in parameter.fan_in)
            return inputs, math.prod(sizes.values()) // inputs
        return (math.prod(sizes.values()),) if parameter.role in CONSTANT else tuple(sizes.values())

    def _size(self, axis: str, size: int) -> int:
        return self._vocab_size or 0 if axis == "vocabulary" else size


def _own_axes(parameter: Parameter) -> Mapping[str, int]:
    """Those of one layer."""
    return {axis: size for axis, size in parameter.axes.items() if axis != "layers"}
