"""Sampling: its distribution against NumPy and Transformers, and the samples against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation.sampling import GREEDY, Sampling, filtered_logits, penalize_repetition, sample
from tests.peers import require

V = 50


def logits_of(seed: int, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def probabilities(logits_BV: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the probabilities [B, V] after `filtered_logits`."""
    logits_BN, ids_BN = filtered_logits(jnp.asarray(logits_BV), sampling)
    actual = np.zeros(logits_BV.shape)
    np.put_along_axis(actual, np.asarray(ids_BN), np.asarray(jax.nn.softmax(logits_BN)), axis=-1)
    return actual


def expected(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Returns the probabilities of one row by the definitions, token after token in float64."""
    p = np.exp(logits_V.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: sampling.top_k or len(p)]
    total, nucleus = sum(p[i] for i in kept), []
    for i in kept:
        if nucleus and sum(p[j] for j in nucleus) / total >= sampling.top_p:
            break
        nucleus.append(i)
    actual = np.zeros_like(p)
    actual[nucleus] = p[nucleus] / sum(p[i] for i in nucleus)
    return actual


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, V, V + 5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
)


@settings(max_examples=30)
@given(sampling=samplings, seed=st.integers(0, 100))
def test_candidates_have_the_probabilities_of_the_definitions(sampling: Sampling, seed: int):
    logits = logits_of(seed)
    want = np.stack([expected(row, sampling) for row in logits])
    np.testing.assert_allclose(probabilities(logits, sampling), want, atol=1e-5)


def test_candidates_and_penalty_are_those_of_transformers():
    torch, process = require("torch"), require("transformers.generation.logits_process")
    logits = logits_of(3, rows=20)
    had = np.random.default_rng(4).integers(0, V, (20, 9))
    seen_BV = np.zeros_like(logits, bool)
    np.put_along_axis(seen_BV, had, True, axis=-1)
    for sampling in (
        Sampling(1.7, 0.6, 12, 0.8), Sampling(0.5, 2.0, 0, 0.95), Sampling(1.2, 1.0, 3), Sampling(temperature=0.7)
    ):  # fmt: skip
        scores = torch.tensor(logits)
        ids = torch.tensor(had)
        if sampling.penalizes:
            scores = process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
        scores = process.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
        if sampling.top_k:
            scores = process.TopKLogitsWarper(sampling.top_k)(ids, scores)
        if sampling.top_p < 1:
            scores = process.TopPLogitsWarper(sampling.top_p)(ids, scores)
        ours = penalize_repetition(jnp.asarray(logits), jnp.asarray(seen_BV), sampling.repetition_penalty)
        theirs = torch.softmax(scores, dim=-1).numpy()
        np.testing.assert_allclose(probabilities(np.asarray(ours), sampling), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=2.0, top_k=6), Sampling(0.5, 0.7, 0, 0.9), Sampling(top_k=9, top_p=0.8)],
)
def test_draws_have_these_probabilities(sampling: Sampling):
    logits, count = logits_of(1, rows=1), 20_000
    had = jnp.zeros((1, V), bool).at[:, ::2].set(True)
    keys = jax.random.split(jax.random.key(5), count)
    drawn = sample(jnp.tile(logits, (count, 1)), keys, sampling, jnp.tile(had, (count, 1)))
    counts = np.bincount(np.asarray(drawn), minlength=V)
    p = expected(np.where(had, np.where(logits > 0, logits / 0.5, logits * 0.5), logits)[0], sampling) \
        if sampling.penalizes else expected(logits[0], sampling)  # fmt: skip
    assert counts[p == 0].sum() == 0
    # Chi-square over tokens that are expected at least five times, with its mean and deviation if they agree.
    often = p * count >= 5
    freedom = often.sum() - 1
    chi_square = np.sum((counts[often] - p[often] * count) ** 2 / (p[often] * count))
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom) + 1e-9
    assert counts[~often].sum() < 20 * max((p[~often] * count).sum(), 1)


def test_each_row_has_its_own_key_and_greedy_needs_none():
    logits = jnp.zeros((2, V))
    a, b = jax.random.split(jax.random.key(0))
    both = sample(logits, jnp.stack([a, b]), Sampling())
    assert sample(logits, jnp.stack([b, a]), Sampling()).tolist() == both.tolist()[::-1]
    assert both[0] != both[1]
    assert sample(jnp.asarray(logits_of(2)), jnp.stack([a] * 3), GREEDY).tolist() == logits_of(2).argmax(-1).tolist()
