"""Reads the weights of a checkpoint layer by layer, for models larger than this machine's memory."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from data.errors import InputError
from model.parameters import Parameter
from train.checkpoint.checksum import partial_checksum
from train.run.storage import is_remote

# Bytes of an array that are kept for its next layer, if its layers are stored together.
CACHE_BYTES = 2**28


class CheckpointReader:
    """A `ParameterReader` of a checkpoint's item, which checks the checksum of each array that has been read."""

    def __init__(self, place: epath.Path, sums: Mapping[str, int], parameters: Mapping[str, Parameter]):
        self.place = place
        self.parameters = parameters
        self._expected = sums
        self._sums = dict.fromkeys(parameters, 0)
        self._unread: dict[str, set[int | None]] = {
            name: set(range(p.shape[0]) if "layers" in p.axes else [None]) for name, p in parameters.items()
        }
        self._cache = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays: dict[str, Any] = {}

    def __call__(self, name: str, layer: int | None) -> np.ndarray:
        """Returns one parameter, or a layer. InputError if it is unreadable, or its checksum differs at its end."""
        try:
            stored = self._open(name)
            array: np.ndarray = np.asarray((stored if layer is None else stored[layer]).read().result())
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(name, str(error).splitlines()[0][:160]) from None
        if layer in self._unread[name]:
            self._unread[name].remove(layer)
            start = (layer or 0) * array.size if self.parameters[name].axes else 1
            self._sums[name] += partial_checksum(array, start)
            if not self._unread[name] and self._sums[name] % 2**32 != self._expected.get(name):
                raise self._damaged(name, "its bits are not those that were saved")
        return array

    def _open(self, name: str) -> Any:
        if name not in self._arrays:
            spec = {"driver": "zarr", "kvstore": {**ocdbt_store(self.place), "path": f"{name}/"}}
            array = tensorstore.open(spec, read=True).result()
            chunk: Any = array.chunk_layout.read_chunk.shape
            if "layers" in self.parameters[name].axes and chunk[0] > 1:
                array = tensorstore.open(spec, context=self._cache, read=True).result()
            if (shape := tuple(array.shape)) != (expected := self.parameters[name].shape):
                raise ValueError(f"it has the shape {shape}; by the config it is {expected}")
            self._arrays[name] = array
        return self._arrays[name]

    def _damaged(self, name: str, why: str) -> InputError:
        if not self.place.exists():
            return InputError(f"{self.place} was removed while it was read, by the run that trains; start again")
        return InputError(f"{self.place} is damaged ({name}: {why}); take another step, as in RUN@STEP")


def ocdbt_store(place: epath.Path) -> dict[str, Any]:
    """Returns tensorstore's spec of the key-value store of an item."""
    path = os.fspath(place)
    base = path if is_remote(path) else {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    return {"driver": "ocdbt", "base": base}
