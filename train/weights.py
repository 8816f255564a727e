"""Weights as files for inference: a folder that Hugging Face Transformers opens, written and read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.errors import InputError
from data.tokenizer import Tokenizer
from data.tokenizer_export import write_huggingface_tokenizer
from model.config import ModelConfig
from model.interchange import llama


def write_huggingface(folder: Path, config: ModelConfig, weights: Any, tokenizer: Tokenizer, context: int) -> None:
    """Write `config.json`, `model.safetensors` (float32) and the tokenizer; the folder appears whole or not at all.

    Args:
        folder: an earlier export there is replaced, anything else refused.
        config: of the model, resolved.
        weights: the nested dictionary of arrays, all addressable.
        tokenizer: of the run.
        context: the positions that the model was trained on at once.

    Raises:
        InputError: the folder holds something else.
    """
    check_export_folder(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    values = llama.config_to_theirs(config, context, tokenizer.eos_id)
    (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    generation = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(llama.to_theirs(config, weights), partial / "model.safetensors", metadata={"format": "pt"})
    write_huggingface_tokenizer(tokenizer, partial, context)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_export_folder(folder: Path) -> None:
    """InputError where exporting to this folder would overwrite what is no export."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the export")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model.safetensors").exists():
        raise InputError(f"{folder} holds other things than an export; name a new folder")


def read_huggingface(folder: Path) -> tuple[ModelConfig, dict[str, Any], Tokenizer, int]:
    """(config, nested float32 weights, tokenizer, context) of an exported folder.

    Raises:
        InputError: a file is missing or damaged, or the model is of another kind.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: it is neither a run nor exported weights")
    try:
        values = json.loads((folder / "config.json").read_text())
        config = llama.config_from_theirs(values)
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            weights = llama.from_theirs(config, lambda name: np.asarray(file.get_tensor(name)))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: these weights cannot be read: {error}") from None
    return config, weights, Tokenizer.load(folder), values.get("max_position_embeddings", 2048)
