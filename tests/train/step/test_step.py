"""The training step: accumulation, the loss it reports, clipping and decay."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import optax
import pytest

import train.step.state
from model.parameters import parameter_table
from model.trees import flattened
from tests.small import mesh_of, small_batch, small_model
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding, one_device_mesh
from train.step.optimizer import make_optimizer
from train.step.schedule import batch_size, learning_rate
from train.step.state import abstract_state, make_state
from train.step.step import StepPrograms, make_train_step, summed_loss


def config_for(optimizer: dict | None = None, **train: object) -> Config:
    config = make_config({"train": {"batch_size": 8, "num_steps": 50, **train}, "optimizer": optimizer or {}})
    return dataclasses.replace(config, model=small_model(num_layers=1))


def objective_and_cross_entropy(config: Config, weights: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    objective, sums = jax.jit(functools.partial(summed_loss, config))(weights, batch)
    return objective, sums["loss"]


def run(config: Config, steps: int = 2):
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        metrics = {}
        for seed in range(steps):
            state, metrics = step(state, small_batch(seed=seed))
        return jax.device_get((state, metrics))


def test_accumulation_changes_nothing_but_memory():
    whole, expected = run(config_for())
    # Rows carry unequal weights, so an average of the parts' averages would differ.
    state, metrics = run(config_for(accumulation_steps=8))
    for name in expected:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    for one, other in zip(jax.tree.leaves(state["weights"]), jax.tree.leaves(whole["weights"]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_ramp_has_one_program_a_stage_and_its_parts_change_nothing_but_memory(caplog):
    ramp = {"batch_size": 8, "batch_ramp_start": 4, "batch_ramp_steps": 2}

    def losses(**train: object):
        config = config_for(**ramp, **train)
        with jax.set_mesh(one_device_mesh()), jax.log_compiles():
            optimizer = make_optimizer(config)
            state, programs = make_state(config, optimizer), StepPrograms(config, optimizer)
            found = []
            for step in range(1, 5):
                batch = small_batch(batch_size(config, step - 1), seed=step)
                assert programs.has(step) == (step % 2 == 0)
                programs.compiled(step, state, batch)
                state, metrics = programs(step, state, batch)
                found.append((float(metrics["loss_weight"]), float(metrics["loss"]), float(metrics["grad_norm"])))
            return np.array(found)

    whole = losses()
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 2
    np.testing.assert_array_equal(whole[:, 0], np.array([4, 4, 8, 8]) * 16 - 8)
    np.testing.assert_allclose(losses(accumulation_steps=2), whole, rtol=2e-5)
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 4


def test_initial_weights_have_the_same_bits_however_far_their_program_is_optimized(monkeypatch):
    config, states = dataclasses.replace(config_for(), model=small_model(num_layers=1, tie_embeddings=True)), []
    for level in (1, 3):
        monkeypatch.setattr(
            train.step.state, "one_time_options", lambda level=level: {"xla_backend_optimization_level": level}
        )
        with jax.set_mesh(one_device_mesh()):
            states.append(jax.device_get(make_state(config, make_optimizer(config))))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_program_is_compiled_ahead_and_is_the_one_that_runs(caplog):
    config = config_for(batch_size=16, batch_ramp_start=8, batch_ramp_steps=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, segment_length=16))
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    mesh, optimizer = mesh_of(fsdp=4), make_optimizer(config)
    programs = StepPrograms(config, optimizer)
    with jax.set_mesh(mesh):
        programs.compile_ahead(1)
        state, batch = make_state(config, optimizer), jax.device_put(small_batch(8), batch_sharding(mesh))
        programs.compiled(1, state, batch)
        programs(1, state, batch)
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_a_skipped_step_changes_the_step_and_the_schedule_alone(name):
    config = config_for({"name": name}, ema_decay=0.9)
    with jax.set_mesh(mesh_of(fsdp=4)):
        optimizer = make_optimizer(config)
        shapes, random = abstract_state(config, optimizer), np.random.default_rng(0)
        # As after one step: all counts are 1, and no two arrays are the same.
        before = jax.tree.map(
            lambda x: (random.normal(size=x.shape) if x.ndim else np.ones(())).astype(x.dtype), shapes
        )
        state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), before, shapes)
        state, metrics = jax.device_get(StepPrograms(config, optimizer).skip(state))
        assert metrics["loss_weight"] == 0
        assert metrics["learning_rate"] == pytest.approx(float(learning_rate(config)(1)))
    counts = [before.pop("step"), *jax.tree.leaves(before["optimizer"].pop("schedule"))]
    assert [state.pop("step"), *jax.tree.leaves(state["optimizer"].pop("schedule"))] == [n + 1 for n in counts]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_may_be_a_single_row():
    config = config_for(batch_size=1)
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        batch = jax.device_put(small_batch(1), batch_sharding(jax.sharding.get_mesh()))
        _, metrics = make_train_step(config, optimizer)(make_state(config, optimizer), batch)
    assert 5 < float(metrics["loss"]) < 7


def test_the_loss_is_the_weighted_mean_of_cross_entropy_in_nats():
    config, batch = config_for(), small_batch()
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        one, _ = objective_and_cross_entropy(config, state["weights"], batch)
        ignored = dict(batch, targets=np.where(batch["loss_weights"] > 0, batch["targets"], 7))
        assert float(one) == float(objective_and_cross_entropy(config, state["weights"], ignored)[0])
        _, metrics = make_train_step(config, optimizer)(state, batch)
    assert metrics["loss_weight"] == batch["loss_weights"].sum() == 8 * 16 - 8
    assert float(metrics["loss"]) == pytest.approx(float(one) / 120, rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(np.log(300), abs=0.6)


def test_smoothing_and_z_loss_are_minimized_but_the_loss_stays_cross_entropy():
    plain, batch = config_for(), small_batch()
    smoothed = dataclasses.replace(plain, model=small_model(num_layers=1, label_smoothing=0.2, z_loss=0.1))
    with jax.set_mesh(one_device_mesh()):
        weights = make_state(plain, make_optimizer(plain))["weights"]
        same, cross_entropy = objective_and_cross_entropy(plain, weights, batch)
        objective, reported = objective_and_cross_entropy(smoothed, weights, batch)
        assert float(same) == float(cross_entropy) == float(reported)
        assert float(objective) > float(reported) + 100
        state, step = (
            make_state(smoothed, make_optimizer(smoothed)),
            make_train_step(smoothed, make_optimizer(smoothed)),
        )
        assert float(step(state, batch)[1]["loss"]) == pytest.approx(float(reported) / 120, rel=1e-6)


def test_every_step_drops_anew_and_the_same_again_and_evaluation_drops_nothing():
    config = dataclasses.replace(
        config_for({"learning_rate": 0.0}), model=small_model(num_layers=1, residual_dropout=0.3)
    )
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        step, losses = make_train_step(config, optimizer), []
        for _ in range(2):
            state = make_state(config, optimizer)
            for _ in range(2):
                state, metrics = step(state, small_batch())
                losses.append(float(metrics["loss"]))
        evaluated = float(objective_and_cross_entropy(config, state["weights"], small_batch())[1]) / 120
    assert losses[:2] == losses[2:]
    assert len({*losses, evaluated}) == 3


def test_an_update_is_adamw_with_clipping_and_decay_of_matrices_alone():
    config = config_for({"clip_norm": 0.1, "weight_decay": 0.5, "warmup_steps": 0, "learning_rate": 0.01})
    batch = small_batch()
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        before = jax.device_get(state["weights"])
        gradients = jax.jit(jax.grad(lambda weights: summed_loss(config, weights, batch)[0] / 120))(state["weights"])
        norm = float(optax.tree.norm(gradients))
        gradients = flattened(jax.device_get(gradients))
        after, metrics = make_train_step(config, optimizer)(state, batch)
        after = flattened(jax.device_get(after["weights"]))
    assert norm > 0.1
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name, parameter in parameter_table(config.model).items():
        weight, gradient = flattened(before)[name], gradients[name] * (0.1 / norm)
        # After one step Adam's bias-corrected moments are the gradient and its square.
        update = gradient / (np.abs(gradient) + 1e-8) + (0.5 * weight if parameter.role != "norm" else 0)
        clear = np.abs(gradient) > 1e-6
        assert clear.mean() > 0.2
        np.testing.assert_allclose(after[name][clear], (weight - 0.01 * update)[clear], atol=2e-5)


def test_the_average_of_the_weights_forgets_fast_at_first_and_changes_no_step():
    config = config_for({"learning_rate": 1e-2}, ema_decay=0.25)
    plain, plain_metrics = run(config_for({"learning_rate": 1e-2}), steps=4)
    assert "average" not in plain
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        expected = jax.device_get(state["weights"])
        for seed, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25)):
            state, metrics = step(state, small_batch(seed=seed))
            latest = jax.device_get(state["weights"])
            expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, latest)
            for one, other in zip(jax.tree.leaves(state["average"]), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-6)
    assert jax.device_get(metrics) == plain_metrics
    for one, other in zip(jax.tree.leaves(latest), jax.tree.leaves(plain["weights"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_learns_a_batch_by_heart():
    config = config_for({"learning_rate": 1e-2, "warmup_steps": 0})
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        for _ in range(50):
            state, metrics = step(state, small_batch())
    assert float(metrics["loss"]) < 1.5
