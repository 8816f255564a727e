"""What is watched: against the weights before and after, in parts and on meshes, beside a step that stays as it is."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import train.step.step
from model.parameters import parameter_table
from model.trees import flattened
from tests.small import mesh_of, small_batch, small_model
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding, one_device_mesh
from train.step.optimizer import make_optimizer
from train.step.state import make_state
from train.step.step import StepPrograms, make_train_step
from train.step.watch import compact


def config_for(**train: object) -> Config:
    config = make_config({"train": {"batch_size": 8, **train}, "optimizer": {"warmup_steps": 0, "clip_norm": 0.1}})
    return dataclasses.replace(config, model=small_model(num_kv_heads=4))


def one_step(config: Config, watches: bool, mesh: Mesh):
    """Weights before and after a step on a mesh, and its metrics."""
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        before = flattened(jax.device_get(state["weights"]))
        batch = jax.device_put(small_batch(), batch_sharding(mesh))
        state, metrics = make_train_step(config, optimizer, watches)(state, batch)
        return before, flattened(jax.device_get(state["weights"])), jax.device_get(metrics)


@pytest.fixture(scope="module")
def watched():
    return one_step(config_for(), True, one_device_mesh())


def test_the_ordinary_step_is_the_same_program_with_and_without():
    with jax.set_mesh(one_device_mesh()):
        texts = []
        for config in (config_for(), config_for(watch_every_steps=5)):
            optimizer = make_optimizer(config)
            make_train_step(config, optimizer, watches=True)
            arguments = make_state(config, optimizer), small_batch()
            texts.append(make_train_step(config, optimizer).lower(*arguments).as_text())
        assert texts[0] == texts[1]
        assert make_train_step(config, optimizer, watches=True).lower(*arguments).as_text() != texts[0]


def test_steps_that_watch_are_those_that_the_number_divides(monkeypatch):
    # The others of this file run what a step makes of `watches`.
    made = lambda config, optimizer, watches: lambda state, batch: (state, {"watch": 0} if watches else {})
    monkeypatch.setattr(train.step.step, "make_train_step", made)
    config = config_for(watch_every_steps=3)
    programs = StepPrograms(config, make_optimizer(config))
    assert [step for step in range(1, 8) if "watch" in programs(step, {}, {})[1]] == [3, 6]


def test_a_watching_step_trains_as_the_ordinary_one_does(watched):
    _, expected, metrics = one_step(config_for(), False, one_device_mesh())
    _, weights, with_watch = watched
    assert with_watch.keys() == metrics.keys() | {"watch"}
    for name, expected_metric in metrics.items():
        assert with_watch[name] == pytest.approx(expected_metric, rel=1e-6)
    for name, array in weights.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)


def test_norms_and_ratios_are_of_each_parameter_and_of_each_layer(watched):
    before, after, metrics = watched
    found, table = metrics["watch"], parameter_table(config_for().model)
    squares = sum(np.sum(np.square(norm)) for norm in found["grad_norm"].values())
    assert np.sqrt(squares) == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert found["grad_norm"].keys() == found["update_ratio"].keys() == table.keys()
    for name, ratio in found["update_ratio"].items():
        weight, change = before[name], after[name] - before[name]
        if "layers" in table[name].axes:
            expected = [np.linalg.norm(change[i]) / np.linalg.norm(weight[i]) for i in range(2)]
            assert found["grad_norm"][name].shape == (2,)
        else:
            expected = np.linalg.norm(change) / np.linalg.norm(weight)
        np.testing.assert_allclose(ratio, expected, rtol=1e-3)


def test_parts_and_meshes_see_the_same(watched):
    mesh = mesh_of(fsdp=2, context=2, tensor=2)
    found = one_step(config_for(accumulation_steps=2), True, mesh)[2]["watch"]
    expected = watched[2]["watch"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4)


def test_a_line_names_the_extremes_and_their_places():
    ratios = {"embedding.table": 0.001, "blocks.attention.query": [0.0004, 0.0031]}
    line = compact({"largest_logit": [3.0, 12.34], "residual_rms": [1.25, 0.5], "update_ratio": ratios})
    assert "largest logit 12.3 (layer 1)" in line
    assert "residual RMS 0.5 to 1.25" in line
    assert "largest update 3.1e-03 of the weight (blocks.attention.query, layer 1)" in line


def test_a_line_shows_what_is_not_finite():
    nan = math.nan
    line = compact({"largest_logit": [1.0, nan], "residual_rms": [1.0, nan], "update_ratio": {"norm": 1.0, "x": nan}})
    assert "largest logit nan (layer 1)  residual RMS 1 to nan  largest update nan of the weight (x)" in line


def test_experts_are_watched_by_layer_and_by_device():
    config = config_for()
    config = dataclasses.replace(config, model=small_model(num_experts=4, expert_dim=24, num_layers=3, dense_layers=1))
    _, _, metrics = one_step(config, True, mesh_of(fsdp=2, expert=2))
    figures = metrics["watch"]["experts"]
    assert {name: value.shape for name, value in figures.items()} == dict.fromkeys(
        ("most", "least", "entropy", "dead", "fullest_shard"), (2,)
    )
    assert float(metrics["expert_load_most"]) == figures["most"].max()
    assert float(metrics["dead_experts"]) == figures["dead"].sum()
    assert 1 <= figures["fullest_shard"].max() <= 2
    line = compact(jax.tree.map(lambda x: x.tolist(), metrics["watch"]))
    assert f"fullest expert {figures['most'].max():.2f} of the mean" in line
