"""How the next token is drawn from its logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """The ways to draw, in the order in which they apply.

    Attributes:
        repetition_penalty: logits of tokens that the prompt or the continuation has are divided by it where they are
            above 0, else multiplied (CTRL; Keskar et al. 2019, section 4.1). 1: none.
        temperature: divides the logits; 0: the most likely token is taken, whatever stands below.
        top_k: so many of the most likely tokens are left; 0: all.
        top_p: the fewest most likely tokens are left that together have this probability (nucleus sampling; Holtzman
            et al. 2019, arXiv:1904.09751). 1: all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens a row has had."""
        return self.repetition_penalty != 1.0


GREEDY = Sampling(temperature=0.0)


def penalized(logits_BV: jax.Array, had_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits after the repetition penalty; `had_BV` says which tokens a row has had."""
    return jnp.where(had_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def candidates(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """What is drawn from: float32 logits [B, N], -inf where a token is left out, and the tokens' ids [B, N].

    N is V, or `top_k`. Where a token is left out for its rank they are in the order of their probability.
    """
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if not sampling.top_k and sampling.top_p == 1.0:
        return logits_BV, jnp.broadcast_to(jnp.arange(V), logits_BV.shape)
    logits_BN, ids_BN = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p < 1.0:
        p_BN = jax.nn.softmax(logits_BN)
        before_BN = jnp.cumsum(p_BN, axis=-1) - p_BN
        # The first is always left.
        left_out_BN = (before_BN >= sampling.top_p) & (jnp.arange(logits_BN.shape[-1]) > 0)
        logits_BN = jnp.where(left_out_BN, -jnp.inf, logits_BN)
    return logits_BN, ids_BN


def draw(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, had_BV: jax.Array | None = None) -> jax.Array:
    """Token ids [B], each row's drawn with its own key.

    Args:
        logits_BV: float32.
        keys_B: of `jax.random.key`.
        sampling: how.
        had_BV: bool, the tokens that a row has had; only for a repetition penalty.
    """
    if sampling.penalizes:
        assert had_BV is not None
        logits_BV = penalized(logits_BV, had_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BN, ids_BN = candidates(logits_BV, sampling)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BN)
    return jnp.take_along_axis(ids_BN, drawn_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
