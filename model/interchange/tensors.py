"""The layout of our parameters in the files of other programs, in both directions.

Our parameters are stacked over layers and keep heads apart, and the embedding has rows of padding. Other programs store
one array for each layer, of at most two axes, without padding. Of experts, which we stack too, most have one array for
each matrix of each expert.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from model.config import ResolvedModelConfig
from model.layers import layers_with
from model.parameters import CONSTANT, Parameter, parameter_table
from model.trees import flattened, nested

# Returns one layer of a parameter of ours by name, or the whole parameter (layer None) if it is not stacked. Layers are
# counted as they are stacked: layer 0 of an expert's weights is the first layer with experts.
ParameterReader = Callable[[str, int | None], np.ndarray]
# Returns one tensor of a file by name.
TensorReader = Callable[[str], np.ndarray]


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: name in the file, with {layer} if there is one for each layer, and {expert} if for each expert.
        parameters: the parameters that it holds, concatenated along its last axis.
        transposed: true for a matrix [outputs, inputs] (PyTorch's Linear); ours are [inputs, outputs].
        by_head: the parameters are concatenated head by head.
        pairs: the parameters in which components that are rotated together are adjacent; ours are half of `rope_dim`
            apart.
        rotated_last: the rotated components of each head follow the others; ours are the first.
        requires: a parameter without which a model does not have this tensor.
        without: a parameter with which a model does not have this tensor.
        branch: which of experts' gate and up, which we store together, it holds: 0 for the gate, 1 for up.
        interleaved: the columns of gate and up alternate; ours are in two halves.
        one_row: a vector that is stored as a matrix of one row.
        heads_apart: each head has a matrix of its own; such a tensor is only written.
        float32: it stays float32 in files of another dtype.
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    pairs: tuple[str, ...] = ()
    rotated_last: bool = False
    requires: str = ""
    without: str = ""
    branch: int | None = None
    interleaved: bool = False
    one_row: bool = False
    heads_apart: bool = False
    float32: bool = False


class FileArray(NamedTuple):
    """One array of a file: a tensor of one layer, as layers are stacked, and perhaps of one expert."""

    name: str
    tensor: Tensor
    layer: int | None = None
    expert: int | None = None


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
    return nested({name: whole_parameter(name, p, read) for name, p in parameter_table(config).items()})


def whole_parameter(name: str, parameter: Parameter, read: ParameterReader) -> np.ndarray:
    """Returns one parameter of a reader, float32, with all of its layers."""
    if "layers" not in parameter.axes:
        return read(name, None)
    array = np.empty(parameter.shape, np.float32)
    for layer in range(parameter.axes["layers"]):
        array[layer] = read(name, layer)
    return array


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
        self._experts = range(config.num_experts or 0)
        # The layers, as files count them, that have each parameter of the blocks.
        self._layers_of = {
            name: layers_with(config, name.split(".")[1]) for name in self.parameters if name.startswith("blocks.")
        }
        self._tensors_of: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            for name in tensor.parameters:
                self._tensors_of.setdefault(name, []).append(tensor)

    def arrays(self) -> list[FileArray]:
        """Returns every array: those before the layers, then layer by layer, then the rest."""
        stacked = [tensor for tensor in self.tensors if "{layer}" in tensor.name]
        first = self.tensors.index(stacked[0])
        layers = []
        for number in range(self.num_layers):
            for tensor in stacked:
                if number in (having := self._layers_of[tensor.parameters[0]]):
                    layers += self._arrays_of(tensor, having.index(number))
        single = [FileArray(tensor.name, tensor) for tensor in self.tensors if tensor not in stacked]
        return [*single[:first], *layers, *single[first:]]

    def _arrays_of(self, tensor: Tensor, layer: int | None) -> list[FileArray]:
        """Returns the arrays of a tensor in one layer: one for each expert, or one."""
        number = None if layer is None else self._layers_of[tensor.parameters[0]][layer]
        experts = self._experts if "{expert}" in tensor.name else (None,)
        return [FileArray(tensor.name.format(layer=number, expert=expert), tensor, layer, expert) for expert in experts]

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of one array."""
        shapes = [self._shape(self.parameters[name], tensor) for name in tensor.parameters]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return (*shape[:-2], shape[-1], shape[-2]) if tensor.transposed else shape

    def write(self, array: FileArray, read: ParameterReader) -> np.ndarray:
        """Makes one array of the file from our parameters."""
        tensor, parts = array.tensor, []
        for name in tensor.parameters:
            parameter = self.parameters[name]
            values = read(name, array.layer)[self._part(array)]
            values = values[tuple(map(slice, self._sizes(parameter, tensor).values()))]
            if name in tensor.pairs:
                values = self._swapped_pairs(values, (2, -1))
            if tensor.rotated_last:
                values = np.roll(values, -self._rope_dim, axis=-1)
            if tensor.interleaved:
                values = values.swapaxes(-1, -2)
            if tensor.heads_apart:
                values = values.swapaxes(0, 1)
            parts.append(values if tensor.by_head else values.reshape(self._shape(parameter, tensor)))
        values = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        if tensor.by_head:
            values = values.reshape(*values.shape[:-2], -1)
        return np.ascontiguousarray(values.swapaxes(-1, -2) if tensor.transposed else values)

    def read(self, name: str, layer: int | None, read: TensorReader) -> np.ndarray:
        """Reads one of our parameters, float32, from the arrays of the file."""
        arrays = [array for tensor in self._tensors_of[name] for array in self._arrays_of(tensor, layer)]
        if len(arrays) == 1:
            return self._read(name, arrays[0], read)
        sizes = {axis: size for axis, size in self.parameters[name].axes.items() if axis != "layers"}
        values = np.empty(tuple(sizes.values()), np.float32)
        for array in arrays:
            values[self._part(array)] = self._read(name, array, read)
        return values

    def _part(self, array: FileArray) -> tuple[Any, ...]:
        """Returns the index of an array's values in one layer of our parameter."""
        expert = () if array.expert is None else (array.expert,)
        return expert if array.tensor.branch is None else (*expert, ..., array.tensor.branch, slice(None))

    def _read(self, name: str, array: FileArray, read: TensorReader) -> np.ndarray:
        tensor, parameter = array.tensor, self.parameters[name]
        values = read(array.name)
        assert values.shape == self.shape(tensor)
        values = values.swapaxes(-1, -2) if tensor.transposed else values
        if tensor.by_head:
            values = values.reshape(
                *values.shape[:-1], next(size for axis, size in parameter.axes.items() if "heads" in axis), -1
            )
        by_head = tensor.by_head
        width = lambda other: self._sizes(other, tensor)["head"] if by_head else self._shape(other, tensor)[-1]
        before = tensor.parameters[: tensor.parameters.index(name)]
        start = sum(width(self.parameters[other]) for other in before)
        values = values[..., start : start + width(parameter)].astype(np.float32)
        sizes = self._sizes(parameter, tensor)
        if tensor.interleaved:
            values = values.reshape(*values.shape[:-1], -1, 2).swapaxes(-1, -2)
        padding = [(0, parameter.axes[axis] - size) for axis, size in sizes.items()]
        values = np.pad(values.reshape(tuple(sizes.values())), padding)
        if tensor.rotated_last:
            values = np.roll(values, self._rope_dim, axis=-1)
        return self._swapped_pairs(values, (-1, 2)) if name in tensor.pairs else values

    def _swapped_pairs(self, array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Reorders the rotated components of heads [..., C], which have this shape, to its transpose."""
        rotated, rest = np.split(array, [self._rope_dim], axis=-1)
        swapped = rotated.reshape(*rotated.shape[:-1], *shape).swapaxes(-1, -2).reshape(rotated.shape)
        return np.concatenate([swapped, rest], axis=-1)

    def _shape(self, parameter: Parameter, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of one array as [inputs, outputs], a vector, or a table, without padding.

        Experts that are stored together, or heads that are apart, are its first axis.
        """
        sizes = self._sizes(parameter, tensor)
        stacked = "heads" if tensor.heads_apart else "experts"
        stack = (sizes.pop(stacked),) if stacked in sizes else ()
        if parameter.fan_in:
            inputs = math.prod(sizes[axis] for axis in parameter.fan_in)
            return *stack, inputs, math.prod(sizes.values()) // inputs
        if tensor.one_row:
            return 1, math.prod(sizes.values())
        return (*stack, math.prod(sizes.values())) if parameter.role in CONSTANT else tuple(sizes.values())

    def _sizes(self, parameter: Parameter, tensor: Tensor) -> dict[str, int]:
        """Returns the axes of one array, without padding."""
        apart = {"layers"} | ({"experts"} if "{expert}" in tensor.name else set())
        apart |= set() if tensor.branch is None else {"branches"}
        sizes = {axis: size for axis, size in parameter.axes.items() if axis not in apart}
        return sizes | ({"vocabulary": self._vocab_size} if "vocabulary" in sizes else {})
