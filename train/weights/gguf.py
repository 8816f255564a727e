"""Weights as one file for llama.cpp: GGUF, in the dtypes that its programs read."""

import importlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError, StorageError
from data.files.atomic import atomic_file
from data.files.writable import why_not_writable
from data.tokenizer.to_gguf import gguf_metadata
from data.tokenizer.tokenizer import Tokenizer
from model import interchange
from model.config import ResolvedModelConfig
from model.interchange import gguf as layout
from model.interchange.tensors import ParameterReader
from train.run.storage import check_free_space

log = logging.getLogger("ziggurat")
DTYPES = ("f32", "f16", "bf16", "q8_0")
MAGIC = b"GGUF"
# Number of values in a row that share one scale in q8_0.
Q8_BLOCK = 32


def check_gguf_file(file: Path) -> None:
    """Raises InputError if the file is not GGUF, cannot be written, or the package for it is missing."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file for the export")
    if file.exists():
        with file.open("rb") as there:
            if there.read(len(MAGIC)) != MAGIC:
                raise InputError(f"{file} is something else than a GGUF file; name a new file")
    if problem := why_not_writable(file.parent):
        raise InputError(f"{file}: {problem}; name another file")
    _library()


def write_gguf(
    file: Path,
    config: ResolvedModelConfig,
    context: int,
    read: ParameterReader,
    tokenizer: Tokenizer,
    dtype: str = "f32",
) -> None:
    """Writes a model with its tokenizer, atomically and with one tensor in memory.

    Vectors and tables of positions stay float32, as in llama.cpp's own converter. In q8_0 (8 bits a value, and a scale
    for 32 of them) a matrix whose rows do not divide by 32 is f16.

    Args:
        file: an earlier GGUF file there is replaced, anything else is refused.
        read: returns the model's parameters, one layer at a time.
        dtype: one of `DTYPES`.

    Raises:
        InputError: the file is something else, llama.cpp cannot compute this model or its tokens, or a value is too
            large for the dtype.
        StorageError: the disk does not have enough room.
    """
    check_gguf_file(file)
    library = _library()
    settings, tokens = _settings(config, context, tokenizer)
    architecture = settings.pop("architecture")
    shapes = layout.shapes(config, interchange.exported_shapes(config, context))
    kinds, sizes = _storage(library, shapes, dtype)

    file = file.resolve()
    with atomic_file(file) as partial:
        check_free_space(partial.parent, sum(sizes.values()))
        writer = library.GGUFWriter(partial, architecture.name)
        try:
            _add(
                writer,
                {"general.type": "model", "general.name": file.stem, "general.file_type": FILE_TYPES[dtype]}
                | {"general.quantization_version": library.GGML_QUANT_VERSION}
                | {f"{architecture.name}.{name}": value for name, value in settings.items()}
                | {f"tokenizer.ggml.{name}": value for name, value in tokens.items()},
            )
            for name, shape in shapes.items():
                writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            exported = interchange.export_tensors(config, context, read)
            for name, array in layout.tensors(config, architecture, exported):
                assert array.shape == shapes[name], name
                writer.write_tensor_data(_quantized(library, name, array, kinds[name]))
        except OSError as error:
            if error.strerror:
                raise
            # NumPy's error names no cause.
            raise StorageError(f"{file} cannot be written: {error}") from None
        finally:
            writer.close()


def _storage(library: Any, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the library's dtype and the bytes of each tensor."""
    types = library.GGMLQuantizationType
    kinds = {name: types[_dtype(name, shape, dtype)] for name, shape in shapes.items()}
    blocks = {name: library.GGML_QUANT_SIZES[kind] for name, kind in kinds.items()}
    sizes = {name: math.prod(shape) // blocks[name][0] * blocks[name][1] for name, shape in shapes.items()}
    if others := [name for name, kind in kinds.items() if dtype == "q8_0" and kind == types.F16]:
        log.warning("%d matrices have rows that do not divide by %d; they are f16", len(others), Q8_BLOCK)
    return kinds, sizes


def _quantized(library: Any, name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    if kind == library.GGMLQuantizationType.F16 and np.abs(array).max() > np.finfo(np.float16).max:
        raise InputError(f"these weights cannot be exported: {name} has values too large for f16; take bf16")
    quantized: np.ndarray = library.quants.quantize(array, kind)
    return quantized


def why_no_gguf(config: ResolvedModelConfig, context: int) -> str | None:
    """Returns what in this model llama.cpp does not compute, or None if it can be written."""
    try:
        layout.architecture_of(config, interchange.family_of(config).kind, context)
    except ValueError as error:
        return str(error)
    return None


# llama.cpp's number for the dtype of most of a file.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def _settings(config: ResolvedModelConfig, context: int, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of the model, with its architecture, and those of the tokenizer."""
    if problem := why_no_gguf(config, context):
        raise InputError(f"these weights cannot be exported: {problem}")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer of {tokenizer.folder} has {tokenizer.vocab_size} ids, the model {config.vocab_size}; take "
            "the model's own"
        )
    family = interchange.family_of(config)
    architecture = layout.architecture_of(config, family.kind, context)
    wide = family.widened(config, context)
    found = layout.metadata(config, architecture, wide.max_positions or context)
    return found | {"architecture": architecture}, gguf_metadata(tokenizer, config.vocab_size)


def _dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Returns the library's name for the dtype of a tensor."""
    if len(shape) == 1 or name in layout.PRECISE:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % Q8_BLOCK else dtype.upper()


def _add(writer: Any, values: Mapping[str, Any]) -> None:
    """Adds settings in the types that llama.cpp reads."""
    for name, value in values.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, value)


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise InputError("a package is missing that writes GGUF: pip install -e '.[gguf]'") from None
