"""Looking inside a model: who attends to whom in each head, and which tokens' embeddings lie close together."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.tokenizer import Tokenizer
from model.decoder import Decoder
from train.config import Config
from train.mesh import TRAINING


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token stands for; of one that is no text its name."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.pieces[token]


def attention_of(config: Config, weights: Any, tokens: Sequence[int]) -> np.ndarray:
    """The attention of each layer and head over one row of tokens, float32 [L, H, T, T]: query, then key.

    Args:
        config: of the model.
        weights: nested, on the ambient mesh.
        tokens: ids, a segment at most.
    """

    @jax.jit
    def weights_of(weights: Any, tokens_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        decoder = Decoder(config.model, weights, TRAINING)
        return decoder.attention_weights(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[:, 0]

    return np.asarray(weights_of(weights, np.array([tokens], np.int32)))


def nearest_tokens(
    table_VD: np.ndarray, query_D: np.ndarray, leave_out: Collection[int], top: int
) -> list[tuple[int, float]]:
    """(token, cosine) of the rows that point the same way as a vector, nearest first.

    Args:
        table_VD: the embedding of each token.
        query_D: not zero.
        leave_out: tokens that are no answer.
        top: how many are wanted.
    """
    lengths_V = np.linalg.norm(table_VD, axis=1) * np.linalg.norm(query_D)
    cosine_V = table_VD @ query_D / np.maximum(lengths_V, np.finfo(np.float32).tiny)
    order = np.argsort(-cosine_V, kind="stable")
    return [(int(v), float(cosine_V[v])) for v in order if int(v) not in leave_out][:top]
