"""Weights as files for inference: a folder that Hugging Face Transformers opens, written and read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.errors import InputError
from data.tokenizer import MODEL_FILE, Tokenizer
from data.tokenizer_export import write_huggingface_tokenizer
from model.config import ModelConfig
from model import interchange

WEIGHTS_FILE = "model.safetensors"
# In config.json: how far the run was.
STEP = "pretraining_step"
# All that an export has.
FILES = {"config.json", "generation_config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json", MODEL_FILE}


def write_huggingface(
    folder: Path, config: ModelConfig, weights: Any, tokenizer: Tokenizer, context: int, step: int
) -> None:
    """Write `config.json`, `model.safetensors` (float32) and the tokenizer; the folder appears whole or not at all.

    Args:
        folder: an earlier export there is replaced, anything else refused.
        config: of the model, resolved.
        weights: the nested dictionary of arrays, all addressable.
        tokenizer: of the run.
        context: the positions that the model was trained on at once.
        step: of the run, kept in config.json.

    Raises:
        InputError: the folder holds something else, or no Transformers class has this model's choices.
    """
    check_export_folder(folder)
    if problem := why_no_export(config):
        raise InputError(f"these weights cannot be exported: {problem}")
    folder = folder.resolve()
    # Names that no folder of the user's own has: both are removed.
    partial, old = (folder.with_name(f".{folder.name}.ziggurat-{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    values = interchange.config_to_theirs(config, context, tokenizer.eos_id) | {STEP: step}
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    generation = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(
        dict(interchange.to_theirs(config, context, interchange.reader_of(weights))),
        partial / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    write_huggingface_tokenizer(tokenizer, partial, context)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_export_folder(folder: Path) -> None:
    """InputError where exporting to this folder would overwrite what is no export."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the export")
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= FILES:
        raise InputError(f"{folder} holds other things than an export; name a new folder")


def why_no_export(config: ModelConfig) -> str | None:
    """What in this model no Transformers class has; none where it can be exported."""
    try:
        interchange.family_of(config)
    except ValueError as error:
        return str(error)
    return None


def exported_step(folder: Path) -> int | None:
    """The step of the weights that a folder holds; none where it holds no export that can be read."""
    try:
        step: int | None = json.loads((folder / "config.json").read_text()).get(STEP)
    except (OSError, ValueError, AttributeError):
        return None
    return step


def is_export(folder: Path) -> bool:
    """Whether a folder holds exported weights, or what is left of them."""
    if (folder / WEIGHTS_FILE).exists():
        return True
    try:
        return "architectures" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def read_huggingface(folder: Path) -> tuple[ModelConfig, dict[str, Any], Tokenizer, int]:
    """(config, nested float32 weights, tokenizer, context) of an exported folder.

    Raises:
        InputError: a file is missing or damaged, or the model is of another kind.
    """
    for name in ("config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; export the weights anew")
    try:
        values = json.loads((folder / "config.json").read_text())
        config = interchange.config_from_theirs(values)
        context = interchange.context_from_theirs(values)
        # NumPy alone has no bfloat16.
        with safe_open(folder / WEIGHTS_FILE, framework="flax") as file:
            weights = interchange.from_theirs(config, context, lambda name: np.asarray(file.get_tensor(name)))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: these weights cannot be read: {error}") from None
    return config, weights, Tokenizer.load(folder), context
