"""The weights of a checkpoint where they lie, read a layer at a time: for models larger than this machine's memory."""

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

# Of an array whose layers are stored together the bytes that are kept for the next layer.
CACHE_BYTES = 2**28


class CheckpointReader:
    """A `Reader` of one checkpoint's weights. An array is checked as soon as all of it has been read.

    Args:
        place: the checkpoint's item.
        sums: its arrays' checksums.
        parameters: the table of its parameters.
    """

    def __init__(self, place: epath.Path, sums: Mapping[str, int], parameters: Mapping[str, Parameter]):
        self.place, self.parameters, self._expected = place, parameters, sums
        self._sums = dict.fromkeys(parameters, 0)
        self._left = {name: set(range(p.shape[0]) if "layers" in p.axes else [None]) for name, p in parameters.items()}
        self._keeping = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays: dict[str, Any] = {}

    def __call__(self, name: str, layer: int | None) -> np.ndarray:
        """One parameter, or one layer of it.

        Raises:
            InputError: it cannot be read, or with this layer all has been read, and it is not what was saved.
        """
        try:
            whole = self._open(name)
            array: np.ndarray = np.asarray((whole if layer is None else whole[layer]).read().result())
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(name, str(error).splitlines()[0][:160]) from None
        if layer in self._left[name]:
            self._left[name].remove(layer)
            self._sums[name] += partial_checksum(array, (layer or 0) * array.size)
            if not self._left[name] and self._sums[name] % 2**32 != self._expected.get(name):
                raise self._damaged(name, "its bits are not those that were saved")
        return array

    def _open(self, name: str) -> Any:
        if name not in self._arrays:
            place = os.fspath(self.place)
            base = place if is_remote(place) else {"driver": "file", "path": f"{os.path.abspath(place)}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            spec = {"driver": "zarr", "kvstore": store}
            array = tensorstore.open(spec, read=True).result()
            chunk: Any = array.chunk_layout.read_chunk.shape
            if "layers" in self.parameters[name].axes and chunk[0] > 1:
                array = tensorstore.open(spec, context=self._keeping, read=True).result()
            if tuple(array.shape) != self.parameters[name].shape:
                raise ValueError(
                    f"it has the shape {tuple(array.shape)}; the config says {self.parameters[name].shape}"
                )
            self._arrays[name] = array
        return self._arrays[name]

    def _damaged(self, name: str, why: str) -> InputError:
        return InputError(f"{self.place} is damaged ({name}: {why}); take another step, as in RUN@STEP")
