"""safetensors files, read and written one tensor at a time; several files with an index are one model.

The format is 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and offsets, and the
data. The library has no streaming writer, and its NumPy interface has no bfloat16.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from data.errors import InputError
from data.files.json_file import parse_json, read_small_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Hugging Face's own limit in bytes.
LARGEST_FILE = 5 * 10**9
# Float dtypes by their names in safetensors.
FLOAT_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
DTYPE_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items()}


class TensorFiles:
    """The tensors of a folder, read on demand. ValueError if a file is missing or damaged, or contradicts the index."""

    def __init__(self, folder: Path):
        self._entries: dict[str, tuple[Path, dict[str, Any], int]] = {}
        if (folder / SINGLE_FILE).is_file():
            self._add(folder / SINGLE_FILE)
        else:
            self._add_shards(folder)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def __call__(self, name: str) -> np.ndarray:
        """Reads one tensor in the dtype of its file. ValueError if it is not a float dtype."""
        if name not in self._entries:
            raise ValueError(f"there is no {name}")
        path, entry, begin = self._entries[name]
        if entry["dtype"] not in FLOAT_DTYPES:
            raise ValueError(f"{name} is of the dtype {entry['dtype']}; what can be read is {', '.join(FLOAT_DTYPES)}")
        shape, dtype = tuple(entry["shape"]), FLOAT_DTYPES[entry["dtype"]]
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", begin + entry["data_offsets"][0], shape)

    def _add(self, path: Path) -> set[str]:
        try:
            # The library checks that the header is complete and fits the file.
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from None
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        self._entries |= {name: (path, header[name], 8 + length) for name in names}
        return names

    def _add_shards(self, folder: Path) -> None:
        try:
            index: dict[str, str] = parse_json(read_small_file(folder / INDEX_FILE).decode())["weight_map"]
            files = sorted(set(index.values()))
            inside = all(name == Path(name).name for name in files)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{INDEX_FILE} is damaged") from None
        if not inside:
            raise ValueError(f"{INDEX_FILE} names files of other folders")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(f"there is no {missing[0]}, which {INDEX_FILE} names")
        for file in files:
            expected = {name for name, where in index.items() if where == file}
            if other := sorted(expected ^ self._add(folder / file)):
                raise ValueError(f"{INDEX_FILE} and {file} do not have the same tensors: {other[0]}")


def write_tensor_files(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes tensors to `model.safetensors`, or to several files and their index beyond `LARGEST_FILE` bytes.

    Args:
        shapes: shapes of all tensors by name, in their order.
        tensors: the same names with their values, of any float dtype; one at a time is in memory.

    Raises:
        ValueError: a value is too large for the dtype.
        OSError: the disk refuses a write.
    """
    shares = list(_shares(shapes, dtype))
    names = [f"model-{i:05}-of-{len(shares):05}.safetensors" for i in range(1, len(shares) + 1)]
    files = dict(zip(names, shares, strict=True)) if len(shares) > 1 else {SINGLE_FILE: shares[0]}
    arrays = iter(tensors)
    for name, share in files.items():
        with (folder / name).open("wb") as file:
            file.write(_header(share, dtype))
            for expected, shape in share.items():
                tensor, array = next(arrays)
                assert (tensor, array.shape) == (expected, shape), tensor
                array = _cast(tensor, array, dtype)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if len(files) > 1:
        where = {tensor: name for name, share in files.items() for tensor in share}
        index = {"metadata": {"total_size": _size(shapes.values(), dtype)}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shares(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yields the tensors of each file."""
    share: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if share and _size([*share.values(), shape], dtype) > LARGEST_FILE:
            yield share
            share = {}
        share[name] = shape
    yield share


def _header(share: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in share.items():
        offsets = [end, end + _size([shape], dtype)]
        entries[name] = {"dtype": DTYPE_NAMES[dtype.name], "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        if not np.isfinite(array).all():
            raise InputError(f"{name} has NaN or infinite values; take another checkpoint")
        larger = "bfloat16" if dtype == np.float16 else "float32"
        most = float(jnp.finfo(dtype).max)
        raise InputError(f"{name} has values above {most:g}, the largest of {dtype.name}; give --dtype={larger}")
    return cast


def _size(shapes: Iterable[tuple[int, ...]], dtype: np.dtype) -> int:
    """Returns the bytes of arrays of some shapes."""
    return sum(map(math.prod, shapes)) * dtype.itemsize
