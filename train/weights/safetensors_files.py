"""safetensors files, read and written one tensor at a time; several files with an index are one model.

The format is 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and offsets, and the
data. The library has no streaming writer, and its NumPy interface has no bfloat16.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
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
# The dtype and the shape of an array.
Kind = tuple[np.dtype, tuple[int, ...]]
DTYPE_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items()}
# Bytes, in which values of fewer bits are packed.
PACKED_DTYPES = {"U8": np.dtype(np.uint8)}


class TensorFiles:
    """The tensors of a folder, read on demand. ValueError if a file is missing or damaged, or contradicts the index.

    Args:
        has_packed: bytes are read, too.
    """

    def __init__(self, folder: Path, has_packed: bool = False):
        self._dtypes = FLOAT_DTYPES | (PACKED_DTYPES if has_packed else {})
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
        if entry["dtype"] not in self._dtypes:
            raise ValueError(f"{name} is of the dtype {entry['dtype']}; what can be read is {', '.join(self._dtypes)}")
        shape, dtype = tuple(entry["shape"]), self._dtypes[entry["dtype"]]
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
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
    in_float32: Collection[str] = (),
) -> None:
    """Writes tensors to `model.safetensors`, or to several files and their index beyond `LARGEST_FILE` bytes.

    Args:
        shapes: shapes of all tensors by name, in their order.
        tensors: the same names with their values, of any float dtype; one at a time is in memory.
        in_float32: names of tensors that are float32 whatever the dtype is.

    Raises:
        ValueError: a value is too large for the dtype.
        OSError: the disk refuses a write.
    """
    kinds = {name: (FLOAT_DTYPES["F32"] if name in in_float32 else dtype, shape) for name, shape in shapes.items()}
    shares = list(_shares(kinds))
    names = [f"model-{i:05}-of-{len(shares):05}.safetensors" for i in range(1, len(shares) + 1)]
    files = dict(zip(names, shares, strict=True)) if len(shares) > 1 else {SINGLE_FILE: shares[0]}
    arrays = iter(tensors)
    for name, share in files.items():
        with (folder / name).open("wb") as file:
            file.write(_header(share))
            for expected, (kind, shape) in share.items():
                tensor, array = next(arrays)
                assert (tensor, array.shape) == (expected, shape), tensor
                array = _cast(tensor, array, kind)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if len(files) > 1:
        where = {tensor: name for name, share in files.items() for tensor in share}
        index = {"metadata": {"total_size": sum(map(_size, kinds.values()))}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shares(kinds: Mapping[str, Kind]) -> Iterator[dict[str, Kind]]:
    """Yields the tensors of each file."""
    share: dict[str, Kind] = {}
    size = 0
    for name, kind in kinds.items():
        if share and size + _size(kind) > LARGEST_FILE:
            yield share
            share, size = {}, 0
        share[name] = kind
        size += _size(kind)
    yield share


def _header(share: Mapping[str, Kind]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in share.items():
        offsets = [end, end + _size((dtype, shape))]
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


def _size(kind: Kind) -> int:
    """Returns the bytes of an array."""
    dtype, shape = kind
    return math.prod(shape) * dtype.itemsize
