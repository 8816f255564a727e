"""Quantized weights of published models, read as float32: the MXFP4 of gpt-oss, and the FP8 of DeepSeek-V3 in blocks.

A tensor is dequantized when it is read, one at a time.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.interchange.tensors import TensorReader

# The values of four bits: a sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# A scale is a power of two, stored with this added to its exponent.
E8M0_BIAS = 127
BLOCKS, SCALES, INVERSE_SCALE = "_blocks", "_scales", "_scale_inv"
E4M3 = np.dtype(jnp.float8_e4m3fn)
# Settings of a quantization that say how to compute with the weights, or which are not quantized.
WITHOUT_EFFECT = ("activation_scheme", "scale_fmt", "modules_to_not_convert", "ignored_layers", "dequantize")


def check_quantization(settings: Any, readable: str | None) -> None:
    """Raises ValueError if weights of a `quantization_config` are not read.

    Args:
        readable: the `quant_method` that the class is read in, if there is one.
    """
    if not isinstance(settings, Mapping) or readable is None or settings.get("quant_method") != readable:
        raise ValueError("quantization_config: quantized weights are not read; take those that they were made of")
    known = {"fp8": ("fmt", "weight_block_size"), "mxfp4": ()}[readable]
    if others := settings.keys() - {"quant_method", *known, *WITHOUT_EFFECT}:
        raise ValueError(f"quantization_config.{min(others)}: quantized weights of this kind are not read")
    if readable == "fp8":
        if settings.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"quantization_config.fmt is {settings['fmt']!r}; what can be read is e4m3")
        _block(settings)


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the rows and columns of a block. ValueError if they are no two numbers above 0."""
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    size = settings.get("weight_block_size")
    raise ValueError(f"quantization_config.weight_block_size is {size!r}; it must be the rows and columns of a block")


class StoredTensors:
    """The tensors of a folder as they were before quantization, under the names that they had.

    Attributes:
        names: the names of all tensors.
    """

    def __init__(self, settings: Mapping[str, Any] | None, names: Collection[str], read: TensorReader):
        """Takes the `quantization_config` that passed `check_quantization`, and the tensors as they are stored."""
        self._read = read
        self._block = _block(settings) if settings and settings["quant_method"] == "fp8" else None
        stored = set(names)
        packed = {name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)} if settings else set()
        self._packed = {name for name in packed if name + SCALES in stored}
        scales = {name for name in stored if name.endswith(INVERSE_SCALE)} if self._block else set()
        self._scaled = {name.removesuffix(INVERSE_SCALE) for name in scales} & stored
        apart = {name + end for name in self._packed for end in (BLOCKS, SCALES)}
        apart |= {name + INVERSE_SCALE for name in self._scaled}
        self.names = [*(name for name in names if name not in apart), *sorted(self._packed)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without dequantizing it. ValueError if its scales do not fit."""
        if name in self._packed:
            blocks, scales = self._read(name + BLOCKS), self._read(name + SCALES)
            if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape[:-1] != scales.shape:
                raise ValueError(f"{name}{SCALES} does not fit {name}{BLOCKS}")
            *stack, rows, groups, size = blocks.shape
            return *stack, 2 * size * groups, rows
        stored = self._read(name)
        if stored.dtype == np.uint8 or (self._block and stored.dtype == E4M3 and name not in self._scaled):
            raise ValueError(f"{name} is quantized, and there is no {name}{INVERSE_SCALE}")
        if name in self._scaled:
            scales = self._read(name + INVERSE_SCALE)
            assert self._block
            blocks_of = tuple(-(-size // block) for size, block in zip(stored.shape, self._block, strict=True))
            if scales.shape != blocks_of:
                raise ValueError(f"{name}{INVERSE_SCALE} has the shape {scales.shape}; its blocks want {blocks_of}")
        return stored.shape

    def __call__(self, name: str) -> np.ndarray:
        """Returns a tensor: float32 if it was quantized, else as it is stored."""
        if name in self._packed:
            return unpacked(self._read(name + BLOCKS), self._read(name + SCALES))
        if name in self._scaled:
            assert self._block
            return rescaled(self._read(name), self._read(name + INVERSE_SCALE), self._block)
        return self._read(name)


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the matrices [E, inputs, outputs], float32, of MXFP4.

    Args:
        blocks: two values in each byte, the lower four bits first, uint8 [E, outputs, inputs/32, 16].
        scales: the exponent of each block, uint8 [E, outputs, inputs/32].
    """
    E, rows, groups, size = blocks.shape
    values = np.empty((E, rows, groups, 2 * size), np.float32)
    for of_expert, packed, exponents in zip(values, blocks, scales, strict=True):
        of_expert[..., 0::2] = E2M1[packed & 15]
        of_expert[..., 1::2] = E2M1[packed >> 4]
        np.ldexp(of_expert, exponents[..., None].astype(np.int32) - E8M0_BIAS, out=of_expert)
    return values.reshape(E, rows, -1).swapaxes(1, 2)


def rescaled(matrix: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns a matrix in float32 whose blocks of this many rows and columns are multiplied by their scales."""
    values = matrix.astype(np.float32)
    for first, of_rows in zip(range(0, len(values), block[0]), scales.astype(np.float32), strict=True):
        values[first : first + block[0]] *= np.repeat(of_rows, block[1])[: values.shape[1]]
    return values
