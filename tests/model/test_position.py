"""Floor 2: the rotary embedding and its scalings, sinusoids, the learned table, and none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.position
from model.decoder import Decoder
from model.interchange.rope import rope_to_huggingface
from model.position import frequencies, rope_rotation, rotate, sinusoids
from tests.peers import require
from tests.small import small_model, small_weights
from train.devices.mesh import one_device_mesh


def test_a_product_of_query_and_key_depends_on_their_distance_alone():
    config = small_model(head_dim=16)
    q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)

    def score(at: int, other: int) -> float:
        angles = rope_rotation(config, jnp.array([[at, other]]))
        rotated = rotate(jnp.array([q, k])[None, None], angles)[0, 0]
        return float(rotated[0] @ rotated[1])

    for distance in (0, 1, 17):
        assert np.isclose(score(distance, 0), score(200 + distance, 200), atol=1e-4)
    assert not np.isclose(score(1, 0), score(5, 0), atol=1e-2)


def test_position_zero_turns_nothing_and_lengths_stay():
    config = small_model(head_dim=8)
    x = jnp.array(np.random.default_rng(1).normal(size=(1, 2, 3, 8)), jnp.float32)
    rotated = rotate(x, rope_rotation(config, jnp.array([[0, 5, 900]])))
    np.testing.assert_array_equal(rotated[:, :, 0], x[:, :, 0])
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_pair_i_turns_by_position_over_base_to_the_2i_over_width():
    config = small_model(head_dim=4, rope_base=100.0)
    rotated = rotate(jnp.array([[[[1.0, 1.0, 0.0, 0.0]]]]), rope_rotation(config, jnp.array([[3]])))
    expected = [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)]
    np.testing.assert_allclose(rotated[0, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_each_platform_turns_pairs_as_complex_numbers_and_the_gradient_back(
    platform: str, dtype: str, tolerance: float, monkeypatch
):
    monkeypatch.setattr(model.position, "platform", lambda: platform)
    x, slope = np.random.default_rng(2).normal(size=(2, 3, 2, 5, 16)).astype(np.float32)
    angles = rope_rotation(small_model(head_dim=16), jnp.arange(15).reshape(3, 5) * 7)
    turns = np.asarray(angles[0]) + 1j * np.asarray(angles[1])

    def turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
        product = (x[..., :8] + 1j * x[..., 8:]) * turns
        return np.concatenate([product.real, product.imag], axis=-1)

    actual, vjp = jax.vjp(lambda x: rotate(x, angles), jnp.asarray(x, dtype))
    (gradient,) = vjp(jnp.asarray(slope, dtype))
    assert actual.dtype == gradient.dtype == dtype
    assert ("dot_general" in str(jax.make_jaxpr(lambda x: rotate(x, angles))(x))) == (platform == "tpu")
    largest = np.abs(x).max() + np.abs(slope).max()
    np.testing.assert_allclose(np.asarray(actual, np.float32), turned(x, turns), atol=tolerance * largest)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), turned(slope, turns.conj()), atol=tolerance * largest)


SCALED = [
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8192, "rope_base": 500_000.0},
    {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original_context": 64, "rope_low_turns": 0.5},
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 4096},
    {"rope_scaling": "yarn", "rope_factor": 16.0, "rope_original_context": 32, "rope_high_turns": 3.0},
]


@pytest.mark.parametrize("changes", SCALED, ids=str)
def test_scaled_frequencies_are_those_of_transformers(changes: dict):
    transformers, rope = require("transformers"), require("transformers.modeling_rope_utils")
    config = small_model(head_dim=64, **changes)
    theirs = transformers.LlamaConfig(
        head_dim=64, max_position_embeddings=99_999, rope_parameters=rope_to_huggingface(config)
    )
    expected, length = rope.ROPE_INIT_FUNCTIONS[changes["rope_scaling"]](theirs, "cpu")
    np.testing.assert_allclose(frequencies(config), expected.numpy(), rtol=2e-6)
    assert float(rope_rotation(config, jnp.zeros((1, 1)))[0].max()) == pytest.approx(length)


def test_scaling_keeps_fast_pairs_and_slows_slow_ones():
    plain = frequencies(small_model(head_dim=64))
    np.testing.assert_allclose(frequencies(small_model(head_dim=64, **SCALED[0])), plain / 4, rtol=1e-6)
    for changes in SCALED[1:]:
        base = changes.get("rope_base", 10_000.0)
        plain = frequencies(small_model(head_dim=64, rope_base=base))
        ratio = plain / frequencies(small_model(head_dim=64, **changes))
        assert ratio[0] == pytest.approx(1.0)
        assert ratio[-1] == pytest.approx(changes["rope_factor"], rel=1e-5)
        assert (np.diff(ratio) > -1e-6).all()


def test_sinusoids_are_the_formula_of_the_paper():
    actual = sinusoids(jnp.array([[0, 3, 40]]), 8)[0]
    for row, position in zip(actual, (0, 3, 40), strict=True):
        for i in range(4):
            angle = position / 10_000 ** (2 * i / 8)
            np.testing.assert_allclose(row[2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-5)


@pytest.mark.parametrize(
    ("position", "matters"), [("rope", True), ("sinusoidal", True), ("learned", True), ("none", False)]
)
def test_the_order_of_the_past_matters_with_any_positions_and_only_with_them(position: str, matters: bool):
    # With two layers the causal mask alone would distinguish the order.
    config = small_model(num_layers=1, position=position, max_positions=8 if position == "learned" else None)
    tokens, places = jnp.array([[1, 2, 3, 4], [3, 1, 2, 4]]), jnp.tile(jnp.arange(4), (2, 1))
    x_BTD = jax.jit(lambda weights: Decoder(config, weights)(tokens, places, jnp.ones_like(tokens)))
    one, other = np.asarray(x_BTD(small_weights(config)))[:, -1]
    if matters:
        assert np.abs(one - other).max() > 1e-2
    else:
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_every_learned_position_that_is_used_is_trained():
    config = small_model(position="learned", max_positions=8)
    tokens, one = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), jnp.int32)
    loss = lambda weights: jnp.sum(jnp.sin(Decoder(config, weights)(tokens, jnp.array([[0, 1, 5]]), one)))
    gradient = jax.jit(jax.grad(loss))(small_weights(config))["position"]["table"]
    assert (np.abs(gradient).max(axis=1) > 0).tolist() == [True, True, False, False, False, True, False, False]


def test_a_cpu_computes_sines_and_cosines_once_for_all_layers():
    config = small_model(num_layers=3)
    ids = jnp.zeros((2, 16), jnp.int32)
    with jax.set_mesh(one_device_mesh()):
        decoder = jax.jit(lambda weights, ids: Decoder(config, weights)(ids, ids, ids))
        text = decoder.lower(small_weights(config), ids).compile().as_text()
    assert (text.count(" cosine("), text.count(" sine(")) == (1, 1)
