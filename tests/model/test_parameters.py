"""The table of parameters: counts and initial values."""

import math

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.parameters import count_parameters, initial_weights, parameter_table
from model.trees import flattened, nested
from tests.small import RECORDS, small_model


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ModelConfig(32, 4096, 32, feedforward_dim=11008, vocab_size=32000), 6_738_415_616),  # Llama 2 7B
        (ModelConfig(32, 4096, 32, 8, feedforward_dim=14336, vocab_size=128256), 8_030_261_248),  # Llama 3 8B
    ],
)
def test_published_models_have_their_published_number_of_parameters(config: ModelConfig, count: int):
    assert count_parameters(config.resolved()) == count


def test_weights_have_the_shapes_and_deviations_of_the_table():
    config = small_model(num_layers=8, model_dim=64, feedforward_dim=256)
    weights = flattened(initial_weights(config, seed=0))
    table = parameter_table(config)
    assert weights.keys() == table.keys()
    for name, parameter in table.items():
        assert weights[name].shape == parameter.shape
        assert weights[name].dtype == np.float32
        if parameter.role == "norm":
            np.testing.assert_array_equal(weights[name], 1.0)
        else:
            fan_in = math.prod(parameter.axes[axis] for axis in parameter.fan_in)
            assert np.std(weights[name]) * math.sqrt(fan_in) == pytest.approx(parameter.scale, rel=0.05)
            assert np.abs(weights[name]).max() * math.sqrt(fan_in) <= math.sqrt(3) * parameter.scale
            assert abs(np.mean(weights[name])) * math.sqrt(fan_in) < 0.05
    residual = [name for name, parameter in table.items() if parameter.scale == 1 / math.sqrt(2 * 8)]
    assert residual == ["blocks.attention.output", "blocks.feedforward.down"]


def test_a_parameter_depends_on_the_seed_and_its_name_alone():
    tied, untied = (flattened(initial_weights(small_model(tie_embeddings=tie), 3)) for tie in (True, False))
    assert set(untied) - set(tied) == {"unembedding.matrix"}
    for name in ("blocks.attention.query", "blocks.feedforward.up"):
        np.testing.assert_array_equal(tied[name], untied[name])
    other = flattened(initial_weights(small_model(), 4))
    assert not np.array_equal(other["embedding.table"], untied["embedding.table"])


def test_blocks_add_no_more_than_the_embedding_put_there():
    for tie in (True, False):
        table = parameter_table(small_model(tie_embeddings=tie, num_layers=8, model_dim=64))
        deviation = 1 / 8 if tie else 1.0
        assert table["embedding.table"].scale == deviation
        assert table["blocks.attention.output"].scale == table["blocks.feedforward.down"].scale == deviation / 4


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"scale_embeddings": True}], ids=str)
def test_learned_positions_begin_at_half_of_the_embedded_tokens_deviation(changes: dict):
    config = small_model(position="learned", max_positions=64, model_dim=64, **changes)
    weights = flattened(initial_weights(config, 0))
    tokens = float(np.std(weights["embedding.table"])) * (8 if config.scale_embeddings else 1)
    assert float(np.std(weights["position.table"])) == pytest.approx(tokens / 2, rel=0.05)


def test_the_vocabulary_is_padded_for_any_mesh_and_not_counted():
    config = small_model(vocab_size=300)
    assert parameter_table(config)["embedding.table"].shape == (384, 32)
    padded = sum(math.prod(p.shape) for p in parameter_table(config).values())
    assert padded - count_parameters(config) == 2 * 84 * 32


def test_nested_and_flattened_are_inverse():
    flat = {"a.b": 1, "a.c.d": 2, "e": 3}
    assert flattened(nested(flat)) == flat
    assert jax.tree.leaves(nested(flat)) == [1, 2, 3]


def test_gates_and_scalars_start_where_they_change_least_and_never_decay():
    config = small_model(num_layers=4, **RECORDS)
    added = parameter_table(config).keys() - parameter_table(small_model(num_layers=4, gated=False)).keys()
    found = {name: (parameter_table(config)[name].role, parameter_table(config)[name].decay) for name in added}
    gate, scalar = ("gate", False), ("scalar", False)
    assert found == {
        "embedding.smear": scalar,
        "embedding.smear_gate": gate,
        "blocks.scalars.residual": scalar,
        "blocks.scalars.first": scalar,
        "blocks.attention.head_gate": gate,
        "blocks.value_embedding.table": ("embedding", True),
        "blocks.value_embedding.value_gate": gate,
    }
    weights = flattened(initial_weights(config, 0))
    for name in added - {"blocks.value_embedding.table"}:
        np.testing.assert_array_equal(weights[name], float(name == "blocks.scalars.residual"))
    assert np.std(weights["blocks.value_embedding.table"]) == pytest.approx(1 / math.sqrt(32), rel=0.02)
    # Two tables of 300 rows of two heads, of which the padding is not counted.
    more = count_parameters(config) - count_parameters(small_model(num_layers=4, gated=False))
    assert more == (1 + 32) + 2 * 4 + 4 * 32 * 4 + 2 * (300 * 16 + 32 * 2)
