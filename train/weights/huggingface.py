"""Weights as files for inference: a folder that Hugging Face Transformers opens, written and read."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.files.atomic import atomic_folder
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.to_huggingface import write_huggingface_tokenizer
from data.tokenizer.tokenizer import MODEL_FILE, Tokenizer
from model import interchange
from model.config import ModelConfig, ResolvedModelConfig
from model.interchange.tensors import ParameterReader
from train.run.storage import check_free_space
from train.weights.safetensors_files import DTYPES, FILE, INDEX, TensorFiles, write_tensor_files

# In config.json: how far the run was. What has it is an export.
STEP = "pretraining_step"
CARD = "README.md"
# All that an export has, beside files of a model that is more than one.
FILES = {
    "config.json", "generation_config.json", FILE, INDEX, CARD, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", MODEL_FILE
}  # fmt: skip
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What --dtype takes: the name of a NumPy dtype, and of a PyTorch one.
FLOATS = {dtype.name: dtype for name, dtype in DTYPES.items() if name in ("F32", "F16", "BF16")}


@dataclass(frozen=True)
class Weights:
    """A model where it lies: nothing of it is in memory but what is read.

    Attributes:
        config: resolved.
        context: positions that it has been trained on at once.
        tokenizer: its tokenizer.
        read: gives its parameters.
        step: of the run that has trained it, where that is known.
    """

    config: ResolvedModelConfig
    context: int
    tokenizer: Tokenizer
    read: ParameterReader
    step: int | None = None


def write_huggingface(folder: Path, weights: Weights, dtype: str = "float32", card: str = "") -> None:
    """Write config.json, safetensors, the tokenizer and a model card; the folder appears whole or not at all.

    One tensor at a time is in memory.

    Args:
        folder: an earlier export there is replaced, anything else refused.
        weights: what is written.
        dtype: one of `FLOATS`.
        card: the text of README.md.

    Raises:
        InputError: the folder holds something else, no Transformers class has this model's choices, its values are too
            large for the dtype, or what is read of it is damaged.
        StorageError: the disk has not enough room.
    """
    check_export_folder(folder)
    config, context, tokenizer = weights.config, weights.context, weights.tokenizer
    check_expressible(config)
    with atomic_folder(folder) as partial:
        shapes = interchange.shapes_of_theirs(config, context)
        check_free_space(partial.parent, sum(map(math.prod, shapes.values())) * FLOATS[dtype].itemsize)
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
        values = interchange.config_to_theirs(config, context, bos_id, eos_id, dtype) | {STEP: weights.step}
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        generation = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        (partial / CARD).write_text(card)
        write_huggingface_tokenizer(tokenizer, partial, context)
        write_tensor_files(partial, shapes, FLOATS[dtype], interchange.to_theirs(config, context, weights.read))


def check_export_folder(folder: Path) -> None:
    """InputError where exporting to this folder would overwrite what is no export."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the export")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in names - FILES if not SHARD.fullmatch(name)}
    if others or (names and STEP not in (_config(folder) or {})):
        raise InputError(f"{folder} holds other things than an export; name a new folder")


def why_no_export(config: ModelConfig) -> str | None:
    """What in this model no Transformers class has; none where it can be exported."""
    try:
        interchange.family_of(config.resolved())
    except ValueError as error:
        return str(error)
    return None


def check_expressible(config: ResolvedModelConfig) -> None:
    """InputError where no Transformers class has this model's choices."""
    if problem := why_no_export(config):
        raise InputError(f"these weights cannot be exported: {problem}")


def exported_step(folder: Path) -> int | None:
    """The step of the weights that a folder holds; none where it holds no export that can be read."""
    step = (_config(folder) or {}).get(STEP)
    return step if isinstance(step, int) else None


def is_export(folder: Path) -> bool:
    """Whether a folder holds exported weights, or what is left of them."""
    return (folder / FILE).exists() or (folder / INDEX).exists() or "architectures" in (_config(folder) or {})


def _config(folder: Path) -> Mapping[str, Any] | None:
    """What its config.json holds; none where there is none that can be read."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def open_huggingface(folder: Path) -> Weights:
    """The weights of a folder, of this project or of others, float32 whatever their files have.

    Raises:
        InputError: a file is missing or damaged, or the model is of another kind; all that the model needs is there
            otherwise, in the right shape.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; export the weights anew")
    if not (folder / FILE).is_file() and not (folder / INDEX).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        remedy = "save pickled ones with Transformers' save_pretrained" if pickled else "export the weights anew"
        raise InputError(f"{folder} has no {FILE}, nor {INDEX}; {remedy}")
    try:
        values = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'} is damaged ({error}); restore it") from None
    try:
        config = interchange.config_from_theirs(values)
        context = interchange.context_from_theirs(values)
        tensors = TensorFiles(folder)
        names = interchange.full_names(values, tensors.names)
        read = lambda name: tensors(names[name])
        interchange.check_theirs(config, context, names, read)
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: these weights cannot be read: {error}") from None
    return Weights(
        config, context, load_tokenizer(folder), interchange.reader_from_theirs(config, context, read),
        exported_step(folder),
    )  # fmt: skip


def in_memory(weights: Weights) -> dict[str, np.ndarray]:
    """All parameters as nested float32 arrays."""
    return interchange.stacked(weights.config, weights.read)
