"""safetensors files, read and written one tensor at a time; several files with an index are one model.

The format is 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and offsets, and the
data. The library has no streaming writer, and its NumPy interface has no bfloat16.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from data.errors import InputError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Hugging Face's own limit.
LARGEST_FILE = 5 * 10**9
# Their names of the dtypes that weights have.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


class TensorFiles:
    """The tensors of a folder, read from the disk on demand.

    Raises:
        ValueError: a file is missing or damaged, or the index contradicts the files.
    """

    def __init__(self, folder: Path):
        self._of: dict[str, tuple[Path, dict[str, Any], int]] = {}
        if (folder / FILE).is_file():
            self._add(folder / FILE)
        else:
            self._add_shards(folder)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._of)

    def __call__(self, name: str) -> np.ndarray:
        """Reads one tensor in the dtype of its file. ValueError if it is not a float dtype."""
        if name not in self._of:
            raise ValueError(f"there is no {name}")
        path, entry, begin = self._of[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of the dtype {entry['dtype']}; what can be read is {', '.join(DTYPES)}")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", begin + entry["data_offsets"][0], shape)

    def _add(self, path: Path) -> set[str]:
        try:
            # It checks that the header is whole and fits the file.
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from None
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        self._of |= {name: (path, header[name], 8 + length) for name in names}
        return names

    def _add_shards(self, folder: Path) -> None:
        try:
            index: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            files = sorted(set(index.values()))
            inside = all(name == Path(name).name for name in files)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{INDEX} is damaged") from None
        if not inside:
            raise ValueError(f"{INDEX} names files of other folders")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(f"there is no {missing[0]}, which {INDEX} names")
        for file in files:
            expected = {name for name, where in index.items() if where == file}
            if other := sorted(expected ^ self._add(folder / file)):
                raise ValueError(f"{INDEX} and {file} do not have the same tensors: {other[0]}")


def write_tensor_files(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes tensors to `model.safetensors`, or to several files and their index beyond `LARGEST_FILE` bytes.

    Args:
        folder: folder to write to; it must exist.
        shapes: shapes of all tensors by name, in their order.
        tensors: the same names with their values, of any float dtype; one at a time is in memory.

    Raises:
        ValueError: a value is too large for the dtype.
        OSError: the disk refuses a write.
    """
    files = list(_shares(shapes, dtype))
    names = (
        [FILE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    arrays = iter(tensors)
    for name, share in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(share, dtype))
            for expected, shape in share.items():
                found, array = next(arrays)
                assert (found, array.shape) == (expected, shape), found
                array = _cast(found, array, dtype)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if len(files) > 1:
        total = sum(_size(shape, dtype) for shape in shapes.values())
        where = {tensor: name for name, share in zip(names, files, strict=True) for tensor in share}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shares(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yields the tensors of each file."""
    share: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if share and size + _size(shape, dtype) > LARGEST_FILE:
            yield share
            share, size = {}, 0
        share[name] = shape
        size += _size(shape, dtype)
    yield share


def _header(share: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in share.items():
        begin, end = end, end + _size(shape, dtype)
        entries[name] = {"dtype": NAMES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise InputError(f"{name} has values above 65504, the largest of float16; give --dtype=bfloat16")
    return cast


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
