"""What settings of groups and the schedules of weight decay do to the updates, and that they change nothing else."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from model.parameters import parameter_table
from model.trees import nested
from tests.optimizers import RATES, assert_close, config_for, in_layers, random_trees, rate, updated_on
from tests.small import mesh_of
from train.checkpoint.trees import to_plain_tree
from train.config.config import Config
from train.config.parameter_groups import parameter_settings
from train.devices.mesh import one_device_mesh
from train.step.optimizer import make_optimizer
from train.step.schedule import learning_rate
from train.step.state import abstract_state

GROUPS = {
    "embedding": {"learning_rate": 0.02, "beta1": 0.5},
    "unembedding": {"beta2": 0.8, "epsilon": 1e-3},
    "vector": {"learning_rate": 0.03, "schedule": "wsd", "decay_fraction": 0.5, "final_fraction": 0.0},
    "matrix": {"weight_decay": 0.3, "warmup_steps": 2},
    "blocks.attention.*": {"learning_rate": 0.005, "weight_decay": 0},
}


def moved(config: Config, shape: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    before, after = random_trees(config)[0], updated_on(config, shape)
    return {name: after[name] - x for name, x in before.items()}


def groups_for(name: str) -> dict[str, dict]:
    """GROUPS without what the optimizer does not use."""
    unused = {"lion": ("epsilon",), "adafactor": ("beta1", "beta2", "epsilon")}.get(name, ())
    groups = {group: {f: x for f, x in fields.items() if f not in unused} for group, fields in GROUPS.items()}
    own = {"muon": {"muon_momentum": 0.8}, "normuon": {"beta2": 0.8}, "soap": {"beta1": 0.8, "beta2": 0.8}}
    own["soap_muon"] = {"muon_momentum": 0.8, "epsilon": 1e-2}
    groups["*.query"] = own.get(name, {"weight_decay": 0.7})
    return {group: fields for group, fields in groups.items() if fields}


@pytest.mark.parametrize("name", ["adamw", "lion", "normuon", "soap_muon"])
def test_each_parameter_is_updated_as_in_a_run_with_its_settings(name: str):
    # The first gradient of a longer side of SOAP does not determine its basis.
    base = {"soap_max_dim": 32} if "soap" in name else {}
    config = config_for(name, groups=groups_for(name), **base)
    found = moved(config)
    settings = parameter_settings(config)
    different = {repr(s): s for s in settings.values()}
    assert len(different) >= 5
    if name == "soap_muon":
        # The other parameters are updated as NorMuon's are.
        matrices = {parameter for parameter, p in parameter_table(config.model).items() if p.role == "matrix"}
        different = {repr(settings[parameter]): settings[parameter] for parameter in matrices}
        assert len(different) >= 3
    for s in different.values():
        expected = moved(dataclasses.replace(config, optimizer=s))
        names = [parameter for parameter in found if settings[parameter] == s]
        assert_close({n: found[n] for n in names}, {n: expected[n] for n in names}, 1e-5)


def test_groups_are_the_same_on_every_mesh():
    config = config_for("muon", groups=GROUPS, weight_decay_schedule="corrected", cautious_weight_decay=True)
    assert_close(moved(config, {"fsdp": 2, "context": 2, "tensor": 2}), moved(config), 1e-4)


@pytest.mark.parametrize("name", RATES)
def test_the_state_does_not_depend_on_groups_or_schedules(name: str):
    choices = {"weight_decay_schedule": "cosine", "cautious_weight_decay": True, "groups": groups_for(name)}
    if "muon" in name:
        choices |= {"muon_momentum_start": 0.5}
    trees = []
    with jax.set_mesh(one_device_mesh()):
        for config in (config_for(name), config_for(name, **choices)):
            optimizer = make_optimizer(config)
            state = abstract_state(config, optimizer)
            trees.append(to_plain_tree(state["optimizer"]))
            after = jax.eval_shape(optimizer.update, state["weights"], state["optimizer"], state["weights"])[1]
            assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state["optimizer"])
    assert trees[0] == trees[1]


def test_without_groups_the_program_is_that_of_optax():
    config = config_for("adamw", clip_norm=1.0)
    c = config.optimizer
    decays = nested({name: p.decay for name, p in parameter_table(config.model).items()})
    theirs = optax.named_chain(
        ("clip", optax.clip_by_global_norm(1.0)),
        ("adam", optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)),
        ("decay", optax.add_decayed_weights(c.weight_decay, mask=decays)),
        ("schedule", optax.scale_by_learning_rate(learning_rate(config))),
    )

    def text(optimizer: optax.GradientTransformation) -> str:
        def update(gradients, state, weights):
            return optimizer.update(gradients, state, weights)

        with jax.set_mesh(mesh_of(fsdp=2)):
            state = abstract_state(config, optimizer)
            return jax.jit(update).lower(state["weights"], state["optimizer"], state["weights"]).as_text()

    assert text(make_optimizer(config)) == text(theirs)


# ── Weight decay ──────────────────────────────────────────────────────────────────────────────────────────────────────


def lion(config: Config, decay_at, cautious: bool) -> dict[str, np.ndarray]:
    """The weights after Lion's updates with the decay `decay_at(step)`, layer by layer."""
    weights, *gradients = (in_layers(tree) for tree in random_trees(config))
    momentum = dict.fromkeys(weights, np.float32(0))
    for step, gradient in enumerate(gradients):
        for name, x in gradient.items():
            sign = np.sign(np.float32(0.9) * momentum[name] + np.float32(0.1) * x)
            decay = decay_at(step) * weights[name] * (x.ndim > 1)
            if cautious:
                decay = np.where(sign * weights[name] >= 0, decay, 0)
            weights[name] = weights[name] - rate(config, step) * (sign + decay)
            momentum[name] = np.float32(0.95) * momentum[name] + np.float32(0.05) * x
    return weights


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("rate", lambda step: 1.0),
        # The rate falls from the peak to a tenth in 99 steps.
        ("corrected", lambda step: 1 - 0.9 * step / 99),
        ("linear", lambda step: 1 - step / 100),
        ("cosine", lambda step: (1 + np.cos(np.pi * step / 100)) / 2),
    ],
)
def test_decay_follows_its_schedule_and_cautious_decay_the_sign_of_the_update(schedule, factor, cautious: bool):
    # As much as shows in four updates.
    config = config_for("lion", weight_decay=50.0, weight_decay_schedule=schedule, cautious_weight_decay=cautious)
    expected = lion(config, lambda step: 50.0 * factor(step), cautious)
    assert_close(in_layers(updated_on(config)), expected, 1e-5)


def test_corrected_decay_of_a_rate_of_zero_is_none():
    config = config_for("lion", learning_rate=0.0, weight_decay_schedule="corrected", weight_decay=50.0)
    assert all(np.array_equal(x, np.zeros_like(x)) for x in moved(config).values())
