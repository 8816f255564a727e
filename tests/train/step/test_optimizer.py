"""The optimizers: each against another's implementation or its paper's formulas, and what all of them must do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import ModelConfig
from model.parameters import parameter_table
from model.trees import flattened
from tests import peers
from tests.optimizers import (
    DECAY,
    EXPERTS,
    RATES,
    assert_close,
    by_torch,
    config_for,
    in_layers,
    is_matrix,
    random_trees,
    rate,
    shardings,
    updated_on,
)
from tests.small import mesh_of, small_batch, small_model, small_weights
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import CheckpointConfig, Config
from train.devices.mesh import one_device_mesh
from train.step.muon import newton_schulz
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state, make_state
from train.step.step import summed_loss

# ── Against others ────────────────────────────────────────────────────────────────────────────────────────────────────


def split(weights: dict) -> list[dict]:
    """Two of PyTorch's groups: decayed, and not."""
    return [
        {"params": [w for w in weights.values() if (w.ndim > 1) == decays], "weight_decay": DECAY * decays}
        for decays in (True, False)
    ]


def test_adamw_is_pytorchs_and_decays_no_vector():
    torch, config = peers.require("torch"), config_for("adamw", weight_decay=DECAY)
    expected = by_torch(config, lambda weights: [torch.optim.AdamW(split(weights), betas=(0.9, 0.95))])
    assert_close(in_layers(updated_on(config)), expected, 1e-6)


def test_adafactor_is_pytorchs_layer_by_layer():
    torch, config = peers.require("torch"), config_for("adafactor", weight_decay=DECAY)
    expected = by_torch(config, lambda weights: [torch.optim.Adafactor(split(weights), eps=(1e-30, 1e-3))])
    assert_close(in_layers(updated_on(config)), expected, 1e-6)


def test_muon_is_pytorchs_for_matrices_and_adamw_for_the_others():
    torch, config = peers.require("torch"), config_for("muon", weight_decay=DECAY)

    def make(weights):
        matrices = [w for name, w in weights.items() if is_matrix(name)]
        others = {name: w for name, w in weights.items() if not is_matrix(name)}
        return [
            torch.optim.Muon(matrices, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(split(others), betas=(0.9, 0.95)),
        ]

    start, found, expected = in_layers(random_trees(config)[0]), in_layers(updated_on(config)), by_torch(config, make)
    for name, x in start.items():
        error = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name] - x)
        # PyTorch iterates in bfloat16, this test in float32.
        assert error < (0.05 if is_matrix(name) else 1e-5), name


def test_muons_momentum_and_iteration_are_the_papers():
    config = config_for("muon", weight_decay=DECAY, muon_momentum=0.8)
    expected, *gradients = (in_layers(tree) for tree in random_trees(config))
    expected = {name: x.astype(np.float64) for name, x in expected.items() if is_matrix(name)}
    momentum = dict.fromkeys(expected, 0.0)
    for step, gradient in enumerate(gradients):
        for name in expected:
            momentum[name] = 0.8 * momentum[name] + gradient[name]
            x = gradient[name] + 0.8 * momentum[name]
            x = x / np.linalg.norm(x)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
            scaled = 0.2 * np.sqrt(max(x.shape)) * x
            expected[name] = expected[name] - rate(config, step) * (scaled + DECAY * expected[name])
    found = in_layers(updated_on(config))
    assert_close({name: found[name] for name in expected}, expected, 1e-6)


def test_lion_is_the_papers():
    config = config_for("lion", weight_decay=DECAY, beta2=0.99)
    expected, *gradients = (in_layers(tree) for tree in random_trees(config))
    momentum = dict.fromkeys(expected, np.float32(0))
    for step, gradient in enumerate(gradients):
        for name, x in gradient.items():
            sign = np.sign(np.float32(0.9) * momentum[name] + np.float32(0.1) * x)
            decay = DECAY * expected[name] if x.ndim > 1 else 0
            expected[name] = expected[name] - rate(config, step) * (sign + decay)
            momentum[name] = np.float32(0.99) * momentum[name] + np.float32(0.01) * x
    assert_close(in_layers(updated_on(config)), expected, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_newton_schulz_brings_all_singular_values_near_one_whatever_the_shape(dtype: str):
    random = np.random.default_rng(0)
    for shape in ((2, 24, 64), (2, 64, 24), (1, 48, 47)):
        x = random.normal(size=shape)
        found = np.asarray(newton_schulz(jnp.asarray(1e-6 * x, dtype)), np.float64)
        for matrix, result in zip(x, found, strict=True):
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            rotated = u.T @ result @ v.T
            # Five iterations lift singular values from a hundredth of the norm; the polynomial ends them near one.
            seen = s > 0.02 * np.linalg.norm(s)
            assert np.all(np.abs(np.diag(rotated)[seen] - 0.95) < 0.3)
            assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 0.05


# ── What all must do ──────────────────────────────────────────────────────────────────────────────────────────────────


# Two have matrices of which positions' axis has a part, too; test_parameter_groups.py has Muon.
@pytest.mark.parametrize("name", ["lion", "adafactor", "muon", "normuon", "soap", "soap_muon"])
def test_every_mesh_updates_as_one_device_does(name: str):
    # A side of 64 has eigenvectors that the first gradient does not determine.
    soap = {"soap_max_dim": 32, "soap_every_steps": 2} if "soap" in name else {}
    config = config_for(name, **soap)
    config = dataclasses.replace(config, model=small_model(num_kv_heads=4, **EXPERTS | {"expert_dim": 32}))
    before, expected = random_trees(config)[0], updated_on(config)
    with_context = [{"data": 2, "fsdp": 2, "context": 2}] if name in ("adafactor", "soap_muon") else []
    for shape in ({"fsdp": 2, "expert": 2, "tensor": 2}, *with_context):
        after = updated_on(config, shape)
        moved = {name: after[name] - x for name, x in before.items()}
        assert_close(moved, {name: expected[name] - x for name, x in before.items()}, 1e-4)


@pytest.mark.parametrize("name", ["adafactor", "muon", "normuon"])
def test_each_experts_matrices_are_updated_as_those_of_a_dense_model(name: str):
    config = config_for(name)
    mixture = dataclasses.replace(config, model=small_model(num_kv_heads=4, **EXPERTS | {"dense_layers": 0}))
    dense = dataclasses.replace(config, model=small_model(num_kv_heads=4, feedforward_dim=24))

    def as_dense(tree: dict[str, np.ndarray], expert: int) -> dict[str, np.ndarray]:
        gate_up, down = (tree[f"blocks.experts.{part}"][:, expert] for part in ("gate_up", "down"))
        names = [f"blocks.feedforward.{part}" for part in ("gate", "up", "down")]
        return dict(zip(names, (gate_up[:, :, 0], gate_up[:, :, 1], down), strict=True))

    after, trees, others = updated_on(mixture), random_trees(mixture), random_trees(dense)
    alone = updated_on(dense, trees=[one | as_dense(tree, 3) for one, tree in zip(others, trees, strict=True)])
    actual = as_dense(after, 3)
    assert_close(actual, {name: alone[name] for name in actual}, 1e-5)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model: ModelConfig, weights: dict) -> tuple[jax.Array, dict]:
    """Of one batch; no optimizer changes them, so they are compiled once for all."""
    config, batch = dataclasses.replace(config_for("adamw"), model=model), small_batch()
    return jax.value_and_grad(lambda weights: summed_loss(config, weights, batch)[0] / 120)(weights)


def learn(config: Config, steps: int):
    """State and loss after training on one batch again and again."""
    optimizer = make_optimizer(config)
    weights = small_weights(config.model)
    state = jax.jit(optimizer.init)(weights)

    @jax.jit
    def update(gradients, state, weights):
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    for _ in range(steps):
        loss, gradients = loss_and_gradients(config.model, weights)
        weights, state = update(gradients, state, weights)
    return {"weights": weights, "optimizer": state}, float(loss)


def dtypes(state) -> tuple[set[str], set[str]]:
    """Of an optimizer's moments, and of the weights."""
    moments = [x for x in jax.tree.leaves(state["optimizer"]) if x.ndim]
    return {x.dtype.name for x in moments}, {x.dtype.name for x in jax.tree.leaves(state["weights"])}


@pytest.mark.parametrize("name", RATES)
def test_each_learns_a_batch_by_heart_and_stores_moments_as_told(name: str):
    # In float32 its updates are those of others, above.
    config, exact = (config_for(name, moment_dtype=dtype) for dtype in ("bfloat16", "float32"))
    with jax.set_mesh(one_device_mesh()):
        state, loss = learn(config, 60)
        assert dtypes(abstract_state(exact, make_optimizer(exact))) == ({"float32"}, {"float32"})
    assert loss < 2.0
    assert dtypes(state) == ({"bfloat16"}, {"float32"})


# Lion's and Muon's states are parts of AdamW's and NorMuon's.
@pytest.mark.parametrize("name", sorted(RATES.keys() - {"lion", "muon"}))
def test_a_checkpoint_keeps_every_bit_of_each_state(name: str, tmp_path):
    config = config_for(name, moment_dtype="bfloat16")
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        shapes, random = abstract_state(config, make_optimizer(config)), np.random.default_rng(0)
        arrays = jax.tree.map(lambda x: np.asarray(10 * random.normal(size=x.shape)).astype(x.dtype), shapes)
        state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), arrays, shapes)
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        checkpoints.save(state, {})
        checkpoints.wait()
        saved = jax.device_get(state)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        expected = abstract_state(config, make_optimizer(config))
        restored, _ = checkpoints.restore(expected)
    checkpoints.close()
    assert shardings(restored) == shardings(expected)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), other)


def test_states_are_as_small_as_their_papers_say():
    def size(name: str, **changes: object) -> float:
        with jax.set_mesh(one_device_mesh()):
            config = config_for(name, **changes)
            state = abstract_state(config, make_optimizer(config))
        bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        return bytes_of(state["optimizer"]) / bytes_of(state["weights"])

    assert size("adamw") == pytest.approx(2, rel=1e-3)
    assert size("adamw", moment_dtype="bfloat16") == pytest.approx(1, rel=1e-3)
    assert size("lion") == pytest.approx(1, rel=1e-3)
    assert 1 < size("muon") < 2
    assert size("muon") < size("normuon") < size("muon") + 0.02
    # The small model's tables are as large as its matrices.
    assert size("soap", soap_max_dim=31) == pytest.approx(2, rel=1e-3)
    assert size("soap", soap_max_dim=31) < size("soap", soap_max_dim=32) < size("soap") == size("soap_muon")
    assert size("adafactor") < 0.1


def test_weight_decay_follows_the_table():
    config = config_for("lion", weight_decay=DECAY)
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        weights = state["weights"]
        zeros = jax.tree.map(jnp.zeros_like, weights)
        updates = flattened(jax.jit(optimizer.update)(zeros, state["optimizer"], weights)[0])
    for name, p in parameter_table(config.model).items():
        expected = -config.optimizer.learning_rate * DECAY * flattened(weights)[name]
        np.testing.assert_allclose(updates[name], expected if p.decay else 0 * expected, rtol=1e-6)
