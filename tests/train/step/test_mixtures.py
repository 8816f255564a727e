"""Mixtures of experts train the same on every mesh and in parts (C6), and what balances them is of the whole batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.trees import flattened
from tests.benchmarks.meshes import BOUNDS, ROUTERS, Steps, config_for, differences, three_steps
from tests.small import mesh_of, small_batch
from train.devices.mesh import batch_sharding
from train.devices.mesh_checks import mesh_problems
from train.step.optimizer import make_optimizer
from train.step.state import make_state
from train.step.step import make_train_step

# Every router, in one part or four, on meshes that have every axis among them; the benchmark has all of all.
SHAPES = [{"expert": 2, "context": 2}, {"slices": 2, "data": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}]
CASES = [(router, parts, shape) for router, parts, shape in zip(ROUTERS, (1, 4, 1), SHAPES, strict=True)]


# What balances experts is the same in each layer.
ONE_LAYER = {"num_layers": 1, "num_experts": 8, "expert_dim": 24}


@functools.cache
def on_one_device(router: str) -> Steps:
    return three_steps(config_for(rows=32, **ROUTERS[router]), {})


@pytest.mark.parametrize(("router", "parts", "shape"), CASES, ids=str)
def test_every_mesh_and_any_parts_train_the_same_mixture(router: str, parts: int, shape: dict[str, int]):
    actual = three_steps(config_for(parts, 32, **ROUTERS[router]), shape)
    worst = differences(actual, on_one_device(router))
    for name, bound in BOUNDS["experts"].items():
        assert worst[name] <= bound, name


def step_of(parts: int = 1, shape: dict[str, int] | None = None, **model: Any) -> tuple[dict, dict]:
    """Weights, without padding, and metrics after two steps."""
    config = config_for(parts, 32, **ONE_LAYER, **model)
    with jax.set_mesh(mesh_of(**(shape or {}))):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        for seed in range(2):
            batch = jax.device_put(small_batch(32, seed=seed), batch_sharding(jax.sharding.get_mesh()))
            state, metrics = step(state, batch)
        return flattened(jax.device_get(state["weights"])), jax.device_get(metrics)


@functools.cache
def without_balance() -> dict[str, np.ndarray]:
    return step_of(balance_loss=0.0)[0]


@pytest.mark.parametrize("over", ["batch", "row"])
def test_a_strong_balance_loss_is_of_the_whole_batch_in_parts_too(over: str):
    """With a small one a loss of each part would hardly be seen."""
    strong = {"balance_loss": 3.0, "balance_over": over}
    whole, parts = step_of(**strong)[0], step_of(4, **strong)[0]
    router = "blocks.experts.router"
    np.testing.assert_allclose(parts[router], whole[router], atol=2e-7)
    assert np.abs(without_balance()[router] - whole[router]).max() > 1e-5


def test_the_bias_moves_in_every_step_and_is_the_same_on_all_devices():
    fields = {"balance_bias": True, "balance_loss": 0.0, "balance_rate": 0.125}
    config = config_for(rows=32, **ONE_LAYER, **fields)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, expert=2)):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        batch = jax.device_put(small_batch(32), batch_sharding(jax.sharding.get_mesh()))
        state, metrics = step(state, batch)
        balance = state["weights"]["blocks"]["experts"]["balance"]
        copies = [np.asarray(shard.data) for shard in balance.addressable_shards]
    assert set(np.unique(copies[0])) <= {-0.125, 0.0, 0.125}
    assert (copies[0] > 0).any()
    assert (copies[0] < 0).any()
    assert len(copies) == 8
    assert all((copy == copies[0]).all() for copy in copies)
    assert float(metrics["expert_load_most"]) > 1


def test_the_same_bits_twice():
    one, other = (step_of(shape={"fsdp": 2, "expert": 4})[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_padding_counts_for_no_expert():
    config = config_for(**ONE_LAYER, balance_bias=True)
    with jax.set_mesh(mesh_of()):
        optimizer = make_optimizer(config)
        step = make_train_step(config, optimizer)
        batch = small_batch(8)
        other = {name: x.copy() for name, x in batch.items()}
        other["tokens"][-1, 8:] = (other["tokens"][-1, 8:] + 7) % 300
        assert (batch["segment_ids"][-1, 8:] == 0).all()
        one, two = (step(make_state(config, optimizer), batch) for batch in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_an_expert_axis_is_for_experts_and_must_divide_them():
    size = (1, 1, 1, 3, 1, 1)
    dense, odd = config_for(rows=6), config_for(rows=6, num_experts=8)
    assert "mesh.expert = 3 is for experts" in "\n".join(mesh_problems(dense, size))
    assert "model.num_experts = 8 cannot be shared by mesh.expert = 3" in "\n".join(mesh_problems(odd, size))


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ({"experts": ["tensor"], "feedforward": []}, "'experts' are shared by 'tensor', so 'batch' must be"),
        ({"experts": ["context"], "expert_model": ["fsdp"]}, "'experts' are shared by 'context', so 'batch' must be"),
        ({"batch": ["slice", "data", "fsdp"]}, "'experts' are shared by 'expert', so 'batch' must be"),
        ({"expert_model": ["expert"]}, "'experts' and 'expert_model' of one weight are both shared by 'expert'"),
    ],
)
def test_rules_under_which_tokens_would_miss_their_experts_are_refused(rules: dict, problem: str):
    config = config_for(num_experts=8)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules=rules))
    assert problem in "\n".join(mesh_problems(config, (1, 1, 1, 2, 2, 2)))
    dense = dataclasses.replace(config, model=config_for().model)
    assert "experts" not in "\n".join(mesh_problems(dense, (1, 1, 2, 1, 2, 2)))


def test_jit_sees_no_token_dropped_however_unbalanced():
    """A bias sends all tokens to the experts of one device of four, which has blocks for a quarter."""
    config = config_for(rows=32, **ONE_LAYER, router_bias=True)
    with jax.set_mesh(mesh_of(expert=4)):
        state = make_state(config, make_optimizer(config))
        bias = state["weights"]["blocks"]["experts"]["router_bias"]
        state["weights"]["blocks"]["experts"]["router_bias"] = bias + jnp.where(jnp.arange(8) < 2, 50.0, 0.0)
        loads = make_train_step(config, make_optimizer(config))(
            state, jax.device_put(small_batch(32), batch_sharding(jax.sharding.get_mesh()))
        )[1]
    assert float(loads["dead_experts"]) == 6
    assert float(loads["expert_load_most"]) == pytest.approx(4)
