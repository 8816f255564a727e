"""Looks inside a model: attention of each head, nearest embeddings, and predictions at each position."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.tokenizer.tokenizer import Tokenizer
from model.decoder import Decoder
from train.config.config import ResolvedConfig
from train.devices.rules import TRAINING


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns the text of a token, or its name if it has no text."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.pieces[token]


def attention_maps(config: ResolvedConfig, weights: Any, tokens: Sequence[int]) -> np.ndarray:
    """Returns the attention of each layer and head over at most a segment, float32 [L, H, T (query), T (key)]."""

    @jax.jit
    def weights_of(weights: Any, tokens_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        decoder = Decoder(config.model, weights, TRAINING)
        return decoder.attention_weights(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[:, 0]

    return np.asarray(weights_of(weights, np.array([tokens], np.int32)))


def nearest_tokens(
    table_VD: np.ndarray, query_D: np.ndarray, leave_out: Collection[int], top: int
) -> list[tuple[int, float]]:
    """Returns (token, cosine) for the rows of a table nearest to the direction of a vector, nearest first."""
    lengths_V = np.linalg.norm(table_VD, axis=1) * np.linalg.norm(query_D)
    cosine_V = table_VD @ query_D / np.maximum(lengths_V, np.finfo(np.float32).tiny)
    order = np.argsort(-cosine_V, kind="stable")
    return [(int(v), float(cosine_V[v])) for v in order if int(v) not in leave_out][:top]


def inspect_positions(
    config: ResolvedConfig, weights: Any, tokenizer: Tokenizer, tokens: np.ndarray, best: int
) -> list[dict[str, Any]]:
    """Returns the predictions of one pass over the beginning of a document.

    Args:
        tokens: token ids, int32 [n], fewer than a segment.

    Returns:
        n + 1 rows with "position" from 0, "input" and "target" (texts), "loss" in nats, and the "best" predictions,
        each with "token" and "probability". The first input precedes every text; the last row has no target.
    """
    before = len(tokenizer.bos_ids) - 1
    inputs = np.array([*tokenizer.bos_ids, *tokens], np.int32)

    @jax.jit
    def log_probabilities(weights: Any, tokens_BT: jax.Array) -> jax.Array:
        decoder = Decoder(config.model, weights, TRAINING)
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = decoder(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        return jax.nn.log_softmax(decoder.logits(x_BTD))[0]

    log_p_TV = np.asarray(log_probabilities(weights, inputs[None]))[before:]
    order_TV = np.argsort(-log_p_TV, axis=1)[:, :best]

    text = partial(token_text, tokenizer)
    return [
        {
            "position": t,
            "input": text(int(inputs[before + t])),
            "target": text(int(tokens[t])) if t < len(tokens) else None,
            "loss": -float(log_p_TV[t, tokens[t]]) if t < len(tokens) else None,
            "best": [{"token": text(int(v)), "probability": math.exp(log_p_TV[t, v])} for v in order_TV[t]],
        }
        for t in range(len(tokens) + 1)
    ]
