"""Weights as files for inference: writes and reads a folder that Hugging Face Transformers opens."""

import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.files.atomic import atomic_folder
from data.files.json_file import read_json
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.to_huggingface import write_huggingface_tokenizer
from data.tokenizer.tokenizer import MODEL_FILE
from model.config import ModelConfig, ResolvedModelConfig
from model.interchange.huggingface import Interchange, family_of
from model.interchange.quantized import StoredTensors
from model.interchange.tensors import ParameterReader
from train.run.storage import check_free_space
from train.weights.safetensors_files import FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE, TensorFiles, write_tensor_files
from train.weights.weight_source import WeightSource

log = logging.getLogger(__name__)
# The key of config.json with the step of the run, which marks a folder as an export.
STEP_KEY = "pretraining_step"
CARD_FILE = "README.md"
# All files of an export, except the parts of a model in several files.
EXPORT_FILES = {
    "config.json", "generation_config.json", SINGLE_FILE, INDEX_FILE, CARD_FILE, "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
    MODEL_FILE
}  # fmt: skip
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Values of --dtype, which NumPy and PyTorch share.
EXPORT_DTYPES = {dtype.name: dtype for name, dtype in FLOAT_DTYPES.items() if name in ("F32", "F16", "BF16")}


def write_huggingface(folder: Path, weights: WeightSource, dtype: str = "float32", card: str = "") -> None:
    """Writes config.json, safetensors, the tokenizer and a model card, atomically and with one tensor in memory.

    An earlier export in the folder is replaced. The dtype is one of `EXPORT_DTYPES`.

    Raises:
        InputError: the folder holds something else, no Transformers class has this model's choices, values are too
            large for the dtype, or the weights are damaged.
        StorageError: the disk does not have enough room.
    """
    check_export_folder(folder)
    check_expressible(weights.config)
    model = weights.interchange()
    tokenizer = weights.tokenizer
    with atomic_folder(folder, replace=True) as partial:
        shapes = model.shapes
        check_free_space(partial.parent, sum(map(math.prod, shapes.values())) * EXPORT_DTYPES[dtype].itemsize)
        stops = tokenizer.stop_ids if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id
        special: dict[str, Any] = {"bos_token_id": tokenizer.bos_ids[0], "eos_token_id": stops}
        special |= {name: value for name, value in tokenizer.generation_config.items() if value is not None}
        hf_config = model.export_config(tokenizer.bos_ids[0], tokenizer.eos_id, dtype) | {STEP_KEY: weights.step}
        hf_config |= {name: special[name] for name in ("eos_token_id", "pad_token_id") if name in special}
        if weights.config.reward_head:
            hf_config["pad_token_id"] = padding_of_scored(weights)
        write_huggingface_tokenizer(tokenizer, partial, weights.context)
        for name, values in (("config.json", hf_config), ("generation_config.json", special)):
            (partial / name).write_text(json.dumps(values, indent=2) + "\n")
        (partial / CARD_FILE).write_text(card)
        tensors = model.export_tensors(weights.read)
        write_tensor_files(partial, shapes, EXPORT_DTYPES[dtype], tensors, model.float32_tensors)


def padding_of_scored(weights: WeightSource) -> int | None:
    """Returns the token that fills up rows of texts to score: Transformers reads the score before the padding.

    So it is never the last token of a text. A conversation may end with the end token; without another one for padding
    there is none, and Transformers refuses to score several texts at once.
    """
    tokenizer = weights.tokenizer
    pad_id: int | None = tokenizer.generation_config.get("pad_token_id")
    if pad_id is not None and pad_id not in tokenizer.stop_ids:
        return pad_id
    return None if weights.converses else tokenizer.eos_id


def check_export_folder(folder: Path) -> None:
    """Raises InputError if an export to this folder would overwrite anything but an export."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the export")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in names - EXPORT_FILES if not SHARD.fullmatch(name)}
    if others or (names and STEP_KEY not in _config(folder)):
        raise InputError(f"{folder} holds other things than an export; name a new folder")


def why_no_export(config: ModelConfig) -> str | None:
    """Returns what in this model no Transformers class has, or None if it can be exported."""
    try:
        family_of(config.resolved())
    except ValueError as error:
        return str(error)
    return None


def check_expressible(config: ResolvedModelConfig) -> None:
    """Raises InputError if no Transformers class has this model's choices."""
    if problem := why_no_export(config):
        raise InputError(f"these weights cannot be exported: {problem}")


def exported_step(folder: Path) -> int | None:
    """Returns the step of the weights in a folder, or None if it holds no readable export."""
    step = _config(folder).get(STEP_KEY)
    return step if isinstance(step, int) else None


def is_export(folder: Path) -> bool:
    """True if a folder holds exported weights, or a part of them."""
    has_tensors = (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()
    return has_tensors or "architectures" in _config(folder)


def _config(folder: Path) -> Mapping[str, Any]:
    """Returns the values of config.json; none if it cannot be read."""
    values: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        values = read_json(folder / "config.json")
    return values


def read_config(folder: Path) -> Mapping[str, Any]:
    """Returns the values of a folder's config.json. InputError if it has none, or no weights."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json; export the weights again")
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        remedy = "save pickled ones with Transformers' save_pretrained" if pickled else "export the weights again"
        raise InputError(f"{folder} has no {SINGLE_FILE}, nor {INDEX_FILE}; {remedy}")
    return read_json(file)


def open_tensors(folder: Path) -> tuple[Interchange, ParameterReader]:
    """Opens a folder's tensors as our parameters. InputError unless every one of a known model exists, in its shape."""
    hf_config = read_config(folder)
    try:
        model = Interchange.from_config(hf_config)
        settings = hf_config.get("quantization_config")
        files = TensorFiles(folder, has_packed=bool(settings))
        tensors = StoredTensors(settings, files.names, files)
        names = model.full_names(tensors.names)
        read = lambda name: tensors(names[name])
        model.check_tensors(names, read, lambda name: tensors.shape(names[name]))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: these weights cannot be read: {error}") from None

    if left_out := model.left_out(names):
        log.warning("%s: tensors of layers that predict further tokens, left out: %d", folder, len(left_out))

    def finite(name: str) -> np.ndarray:
        array = read(name)
        with np.errstate(over="ignore"):
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise InputError(f"{folder}: {name} has NaN or infinite values in float32; take other weights")
        return array

    return model, model.import_reader(finite)


def open_huggingface(folder: Path) -> WeightSource:
    """Opens a folder's weights as float32, with their tokenizer. InputError as `open_tensors`."""
    model, read = open_tensors(folder)
    return WeightSource(model.config, model.context, load_tokenizer(folder), read, exported_step(folder))
