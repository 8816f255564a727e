"""Sampling: how the next token is drawn from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling, in the order in which they apply.

    Attributes:
        repetition_penalty: logits of tokens that are in the prompt or the continuation are divided by this where they
            are positive, and multiplied by it where not (CTRL; Keskar et al. 2019, section 4.1). 1 changes nothing.
        temperature: divides the logits. At 0 the most likely token is taken, and the settings below have no effect.
        top_k: the number of most likely tokens that remain; 0 keeps all.
        top_p: the fewest most likely tokens remain that together have this probability (nucleus sampling; Holtzman et
            al. 2019, arXiv:1904.09751). 1 keeps all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def penalizes(self) -> bool:
        """True where sampling depends on the tokens that a row has seen."""
        return self.repetition_penalty != 1.0


GREEDY = Sampling(temperature=0.0)


def penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Returns the logits after the repetition penalty; `seen_BV` is True for tokens that a row has seen."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def filtered_logits(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Returns float32 logits [B, N] after temperature, top_k and top_p, and the ids [B, N] of their tokens.

    N is V, or `top_k`. A token that top_p drops has -inf. With top_k or top_p, tokens are sorted by probability.
    """
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if not sampling.top_k and sampling.top_p == 1.0:
        return logits_BV, jnp.broadcast_to(jnp.arange(V), logits_BV.shape)
    logits_BN, ids_BN = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p < 1.0:
        p_BN = jax.nn.softmax(logits_BN)
        before_BN = jnp.cumsum(p_BN, axis=-1) - p_BN
        # The most likely token always remains.
        dropped_BN = (before_BN >= sampling.top_p) & (jnp.arange(logits_BN.shape[-1]) > 0)
        logits_BN = jnp.where(dropped_BN, -jnp.inf, logits_BN)
    return logits_BN, ids_BN


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None) -> jax.Array:
    """Returns token ids [B], int32, each drawn with its row's typed key; a repetition penalty needs `seen_BV`."""
    if sampling.penalizes:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BN, ids_BN = filtered_logits(logits_BV, sampling)
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, logits_BN)
    return jnp.take_along_axis(ids_BN, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
