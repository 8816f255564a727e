"""NorMuon, SOAP and SOAP before Muon, matrix by matrix, against NumPy; Muon's momentum as it rises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.parameters import Parameter, parameter_table
from model.trees import flattened, nested
from tests.optimizers import (
    DECAY,
    STEPS,
    assert_close,
    config_for,
    in_layers,
    is_matrix,
    random_trees,
    rate,
    updated_on,
)
from tests.small import mesh_of
from train.config.config import Config
from train.step.optimizer import make_optimizer
from train.step.soap import scale_by_soap
from train.step.state import abstract_state


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Muon's update of a matrix."""
    y = x / np.linalg.norm(x)
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
    return 0.2 * np.sqrt(max(x.shape)) * y


class Nesterov:
    """Muon's momentum, of which each step has its own decay."""

    def __init__(self, *decays: float):
        self.decays, self.total = list(decays), 0.0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        decay = self.decays.pop(0)
        self.total = decay * self.total + gradient
        return gradient + decay * self.total


class NorMuon:
    """Li et al. 2025, algorithm 1, with columns for neurons; a matrix keeps the norm that Muon gives it."""

    def __init__(self, _: Config):
        self.momentum, self.squares = Nesterov(*STEPS * [0.95]), 0.0

    def __call__(self, gradient: np.ndarray) -> np.ndarray:
        update = orthogonal(self.momentum(gradient))
        self.squares = 0.9 * self.squares + 0.1 * np.mean(update**2, axis=0)
        scaled = update / np.sqrt(self.squares)
        return scaled * np.linalg.norm(update) / np.linalg.norm(scaled)


class Soap:
    """Vyas et al. 2024, algorithms 3 and 4, 20 rounds for the first bases; with `muon`, SOAP-Muon of modded-nanogpt."""

    def __init__(self, config: Config, muon: bool = False):
        self.c, self.muon, self.step = config.optimizer, muon, 0
        self.mean, self.squares, self.momentum = 0.0, 0.0, Nesterov(*STEPS * [0.95])

    def into(self, x: np.ndarray) -> np.ndarray:
        return self.rows.T @ x @ self.columns

    def __call__(self, g: np.ndarray) -> np.ndarray:
        c, t = self.c, self.step
        nesterov = self.momentum(g)
        if t == 0:
            self.grams = [np.zeros((m, m)) for m in g.shape]
            update = nesterov if self.muon else np.zeros_like(g)
        else:
            self.mean = c.beta1 * self.mean + (1 - c.beta1) * g
            squared = self.into(nesterov if self.muon else g) ** 2
            self.squares = c.beta2 * self.squares + (1 - c.beta2) * squared
            if self.muon:
                rotated = self.into(nesterov) / np.sqrt(self.squares)
            else:
                mean, squares = self.mean / (1 - c.beta1**t), self.squares / (1 - c.beta2**t)
                rotated = self.into(mean) / np.sqrt(squares)
            update = self.rows @ rotated @ self.columns.T
        self.turn(g, t)
        self.step += 1
        return orthogonal(update) if self.muon else update

    def turn(self, g: np.ndarray, t: int) -> None:
        """Moves the bases; a side longer than the limit keeps that of its entries."""
        new = [g @ g.T, g.T @ g]
        self.grams = [self.c.beta2 * old + (1 - self.c.beta2) * x for old, x in zip(self.grams, new, strict=True)]
        bases = [np.eye(m) for m in g.shape] if t == 0 else [self.rows, self.columns]
        for _ in range(20 if t == 0 else int(t % self.c.soap_every_steps == 0)):
            for side, gram in enumerate(self.grams):
                if len(gram) <= self.c.soap_max_dim:
                    order = np.argsort(-np.diag(bases[side].T @ gram @ bases[side]))
                    bases[side] = np.linalg.qr(gram @ bases[side][:, order])[0]
                    self.squares = np.take(self.squares, order, side) if t else 0.0
        self.rows, self.columns = bases


def by_numpy(config: Config, rule) -> dict[str, np.ndarray]:
    """The matrices after the updates by the rule that `rule(config)` makes for each, in float64."""
    weights, *gradients = (in_layers(tree) for tree in random_trees(config))
    weights = {name: x.astype(np.float64) for name, x in weights.items() if is_matrix(name)}
    rules = {name: rule(config) for name in weights}
    for step, gradient in enumerate(gradients):
        for name, x in weights.items():
            update = rules[name](gradient[name].astype(np.float64))
            weights[name] = x - rate(config, step) * (update + DECAY * x)
    return weights


def assert_same_updates(config: Config, expected: dict[str, np.ndarray], tolerance: float) -> None:
    before, after = in_layers(random_trees(config)[0]), in_layers(updated_on(config))
    moved = {name: after[name] - before[name] for name in expected}
    assert_close(moved, {name: x - before[name] for name, x in expected.items()}, tolerance)


def test_normuon_is_the_papers():
    config = config_for("normuon", weight_decay=DECAY, groups={"matrix": {"beta2": 0.9}})
    assert_same_updates(config, by_numpy(config, NorMuon), 1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_soap_is_the_papers_on_one_side_and_on_both(every: int):
    # The first gradient of a longer side does not determine its eigenvectors.
    config = config_for("soap", weight_decay=DECAY, soap_every_steps=every, soap_max_dim=32)
    assert_same_updates(config, by_numpy(config, Soap), 2e-3)


def first_matrix(table: dict[str, Parameter]) -> str:
    return next(name for name, p in table.items() if p.role == "matrix")


def test_soap_without_sides_is_adam_one_step_late():
    config = config_for("soap", soap_max_dim=1)
    table = parameter_table(config.model)
    name = first_matrix(table)
    soap, adam = scale_by_soap(table, config.optimizer), optax.scale_by_adam(0.9, 0.95, 1e-8)
    with jax.set_mesh(mesh_of()):
        gradient = jnp.full(table[name].shape, 0.5)
        states = soap.init(nested({name: gradient})), adam.init(nested({name: gradient}))
        nothing, state = soap.update(nested({name: gradient}), states[0])
        late, _ = soap.update(nested({name: gradient}), state)
        update, _ = adam.update(nested({name: gradient}), states[1])
    assert not flattened(nothing)[name].any()
    assert_close(flattened(late), flattened(update), 1e-5)


def test_a_matrix_has_its_first_bases_from_its_first_gradient():
    """One that is zero at first, as with `zero_init_outputs`, ends where it would have begun a step later."""
    config = config_for("soap", soap_every_steps=10)
    table = parameter_table(config.model)
    name = first_matrix(table)
    soap = scale_by_soap(table, config.optimizer)
    with jax.set_mesh(mesh_of()):
        gradient = jax.random.normal(jax.random.key(0), table[name].shape)
        first = soap.init(nested({name: gradient}))
        _, late = soap.update(nested({name: jnp.zeros_like(gradient)}), first)
        bases = [soap.update(nested({name: gradient}), state)[1].row_bases for state in (first, late)]
    assert_close(flattened(bases[1]), flattened(bases[0]), 1e-5)


def test_soap_before_muon_is_that_of_modded_nanogpt():
    config = config_for("soap_muon", weight_decay=DECAY, soap_every_steps=2, soap_max_dim=32)
    assert_same_updates(config, by_numpy(config, lambda config: Soap(config, muon=True)), 2e-3)


def test_muons_momentum_rises_in_a_line():
    config = config_for("muon", weight_decay=DECAY, muon_momentum_start=0.5, muon_momentum_warmup_steps=2)

    class Muon:
        def __init__(self, _: Config):
            self.momentum = Nesterov(0.5, 0.725, 0.95, 0.95)

        def __call__(self, gradient: np.ndarray) -> np.ndarray:
            return orthogonal(self.momentum(gradient))

    assert_same_updates(config, by_numpy(config, Muon), 1e-4)


def test_the_other_parameters_are_updated_as_by_muon():
    expected = updated_on(config_for("muon"))
    for name in ("normuon", "soap", "soap_muon"):
        found = updated_on(config_for(name))
        for parameter, p in parameter_table(config_for(name).model).items():
            assert np.array_equal(found[parameter], expected[parameter]) == (p.role != "matrix"), parameter


def test_what_soap_stores_is_shared_by_all_devices():
    config = config_for("soap")
    with jax.set_mesh(mesh_of(fsdp=2, data=2, tensor=2)):
        state = abstract_state(config, make_optimizer(config))["optimizer"]["soap"]
    for field in ("row_statistics", "row_bases", "column_statistics", "column_bases"):
        for x in flattened(getattr(state, field)).values():
            # Two layers on two devices each, which four more share by rows.
            assert x.sharding.shard_shape(x.shape)[0] == 1
            assert np.prod(x.sharding.shard_shape(x.shape)) == x.size / 8
    with jax.set_mesh(mesh_of(fsdp=2, data=2, tensor=2)):
        weights = flattened(abstract_state(config, make_optimizer(config))["weights"])
    for field in ("momentum", "squares"):
        for name, x in flattened(getattr(state, field)).items():
            assert x.sharding == weights[name].sharding
