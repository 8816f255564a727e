"""The logits of a folder of weights, by this decoder and by Transformers, position by position."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.errors import InputError
from model.decoder import Decoder
from model.interchange.tensors import nested_weights
from train.weights.huggingface import open_tensors

# The largest difference of two float32 logits that are computed in another order, as a share of the largest logit.
SAME = 1e-4


class Difference(NamedTuple):
    """Two vectors of logits at one position: their largest difference, and the token that each has as the best."""

    largest: float
    best: int
    other_best: int


def has_transformers() -> bool:
    """True if Transformers and PyTorch are installed."""
    return find_spec("transformers") is not None and find_spec("torch") is not None


def logits_here(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """Returns the float32 logits [T, V] of this decoder. InputError if it cannot read the weights."""
    model, read = open_tensors(folder)
    config = model.config
    weights = jax.tree.map(jnp.asarray, nested_weights(config, read))

    @jax.jit
    def logits(weights: dict, tokens_BT: jax.Array) -> jax.Array:
        decoder = Decoder(config, weights)
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        return decoder.logits(decoder(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))[0, :, : config.vocab_size]

    return np.asarray(logits(weights, np.array([tokens], np.int32)))


def logits_by_transformers(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """Returns the float32 logits [T, V] of Transformers. InputError if it cannot open the folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        # A library's own failure, of any type, about the user's own folder.
        raise InputError(f"{folder}: Transformers cannot open it: {error}") from error
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def differences(logits_TV: np.ndarray, other_TV: np.ndarray) -> tuple[list[Difference], bool]:
    """Returns the difference at each position, and whether all are as small as another order of sums makes them.

    ValueError if the two are of different vocabularies.
    """
    if logits_TV.shape != other_TV.shape:
        raise ValueError(f"their vocabularies have {logits_TV.shape[1]} and {other_TV.shape[1]} tokens")
    largest_T = np.abs(logits_TV - other_TV).max(axis=1)
    pairs = zip(largest_T, logits_TV.argmax(axis=1), other_TV.argmax(axis=1), strict=True)
    return (
        [Difference(float(largest), int(best), int(other)) for largest, best, other in pairs],
        bool(np.all(largest_T <= SAME * np.abs(other_TV).max())),
    )
