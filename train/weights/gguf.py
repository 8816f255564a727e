"""Weights as one file for llama.cpp: GGUF, in the dtypes that its programs read."""

import importlib
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from data.conversations import begins_with_bos
from data.errors import InputError, StorageError
from data.files.atomic import atomic_file
from data.files.writable import why_not_writable
from data.tokenizer.to_gguf import gguf_metadata
from model.interchange.gguf import FLOAT32_TENSORS, GGUFExport
from train.run.storage import check_free_space
from train.weights.weight_source import WeightSource

log = logging.getLogger("ziggurat")
MAGIC = b"GGUF"
# Number of values in a row that share one scale in q8_0.
Q8_BLOCK = 32
# llama.cpp's number for the dtype of most tensors of a file.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
# In models with such a name llama.cpp drops whitespace after special tokens, or requires tokens.
CHANGES_TOKENS = re.compile("phi-?3|modern-bert", re.IGNORECASE)


def check_gguf_file(file: Path) -> None:
    """Raises InputError if the file is not GGUF, cannot be written, or the package for it is missing."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file for the export")
    if os.path.lexists(file) and not (file.is_file() and _begins_with_magic(file)):
        raise InputError(f"{file} is something else than a GGUF file; name a new file")
    if problem := why_not_writable(file.parent):
        raise InputError(f"{file}: {problem}; name another file")
    _library()


def write_gguf(file: Path, weights: WeightSource, dtype: str = "f32") -> None:
    """Writes a model with its tokenizer, atomically and with one tensor in memory.

    Vectors, tables of positions and routers stay float32, as in llama.cpp's own converter. In q8_0 (8 bits per value,
    and one scale per 32 values) a matrix whose rows don't divide by 32 is f16. The other dtypes are f32, f16 and bf16.

    Raises:
        InputError: the file is not GGUF, llama.cpp has no such model or gives other tokens, or values are too large for
            the dtype.
        StorageError: the disk does not have enough room.
    """
    check_gguf_file(file)
    library = _library()
    model = _exported(weights)
    tokens = gguf_metadata(weights.tokenizer, weights.config.vocab_size)
    if weights.converses:
        # llama.cpp puts the token also before a conversation, unless its template does.
        tokens["add_bos_token"] = begins_with_bos(weights.tokenizer)
    shapes = model.shapes()
    types = {name: library.GGMLQuantizationType[_type_name(name, shape, dtype)] for name, shape in shapes.items()}
    blocks = {name: library.GGML_QUANT_SIZES[kind] for name, kind in types.items()}
    sizes = {name: math.prod(shape) // blocks[name][0] * blocks[name][1] for name, shape in shapes.items()}
    f16, bf16 = library.GGMLQuantizationType.F16, library.GGMLQuantizationType.BF16
    if dtype == "q8_0" and (num_f16 := list(types.values()).count(f16)):
        log.warning("%d matrices have rows that do not divide by %d; they are f16", num_f16, Q8_BLOCK)

    model_name = {} if CHANGES_TOKENS.search(file.stem) else {"name": file.stem}
    with atomic_file(file) as partial:
        check_free_space(partial.parent, sum(sizes.values()))
        writer = library.GGUFWriter(partial, model.architecture.name)
        try:
            _add(writer, "general.", {"type": "model", **model_name, "file_type": FILE_TYPES[dtype]})
            _add(writer, "general.", {"quantization_version": library.GGML_QUANT_VERSION})
            _add(writer, f"{model.architecture.name}.", model.metadata())
            _add(writer, "tokenizer.ggml.", tokens)
            if template := weights.tokenizer.chat_template:
                _add(writer, "tokenizer.", {"chat_template": template})
            for name, shape in shapes.items():
                writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], types[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, array in model.tensors(weights.read):
                assert array.shape == shapes[name], name
                problem = None if np.isfinite(array).all() else "NaN or infinite values; take another checkpoint"
                if not problem and types[name] == f16 and np.abs(array).max() > np.finfo(np.float16).max:
                    problem = "values too large for f16; take bf16"
                if not problem and types[name] == bf16 and not np.isfinite(array.astype(jnp.bfloat16)).all():
                    problem = "values too large for bf16; take f32"
                if problem:
                    raise InputError(f"these weights cannot be exported: {name} has {problem}")
                writer.write_tensor_data(library.quants.quantize(array, types[name]))
        except OSError as error:
            if error.strerror:
                raise
            # NumPy's error names no cause.
            raise StorageError(f"{file} cannot be written: {error}") from None
        finally:
            writer.close()


def _begins_with_magic(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _exported(weights: WeightSource) -> GGUFExport:
    try:
        return GGUFExport(weights.interchange())
    except ValueError as error:
        raise InputError(f"these weights cannot be exported: {error}") from None


def _type_name(name: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1 or name.endswith(FLOAT32_TENSORS):
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % Q8_BLOCK else dtype.upper()


def _add(writer: Any, prefix: str, values: Mapping[str, Any]) -> None:
    """Adds settings in the types that llama.cpp reads."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        adders.get(type(value), writer.add_array)(prefix + key, value)


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise InputError("a package is missing that writes GGUF: pip install -e '.[gguf]'") from None
