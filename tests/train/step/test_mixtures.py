"""Mixtures of experts train the same on every mesh and in parts (C6), and what balances them is of the whole batch."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

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


def step_of(parts: int = 1, **model: Any) -> dict[str, np.ndarray]:
    """Weights, without padding, after two steps."""
    config = config_for(parts, 32, **ONE_LAYER, **model)
    with jax.set_mesh(mesh_of()):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        for seed in range(2):
            state, _ = step(state, small_batch(32, seed=seed))
        return flattened(jax.device_get(state["weights"]))


@functools.cache
def router_after_two_steps(over: str, parts: int) -> np.ndarray:
    """With a balance loss so strong that one of each part would be seen."""
    return step_of(parts, balance_loss=3.0, balance_over=over)["blocks.experts.router"]


@pytest.mark.parametrize("over", ["batch", "row"])
def test_a_strong_balance_loss_is_of_the_whole_batch_in_parts_too(over: str):
    whole, other = (router_after_two_steps(of, 1) for of in (over, "row" if over == "batch" else "batch"))
    np.testing.assert_allclose(router_after_two_steps(over, 4), whole, atol=2e-7)
    # The loss shows: over what it is makes a difference.
    assert np.abs(other - whole).max() > 1e-5


class OnEightDevices(NamedTuple):
    """A step with everything that moves a mixture's routing, compiled once for four shards of experts."""

    mesh: Mesh
    begin: dict[str, Any]
    step: Any

    def after(self, batch: dict[str, np.ndarray], router_bias: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        """State and metrics after a step; the routers' bias is for the experts of the first shard."""
        with jax.set_mesh(self.mesh):
            state = jax.tree.map(lambda x: x + 0, self.begin)  # the step takes the memory of what it is given
            experts = state["weights"]["blocks"]["experts"]
            first = jnp.where(jnp.arange(8) < 2, router_bias, 0.0)
            experts["router_bias"] = jax.device_put(experts["router_bias"] + first, experts["router_bias"].sharding)
            return self.step(state, jax.device_put(batch, batch_sharding(self.mesh)))


@pytest.fixture(scope="module")
def on_eight_devices() -> OnEightDevices:
    fields = {"balance_bias": True, "balance_rate": 0.125, "router_bias": True}
    config, mesh = config_for(rows=32, **ONE_LAYER, **fields), mesh_of(fsdp=2, expert=4)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        return OnEightDevices(mesh, make_state(config, optimizer), make_train_step(config, optimizer))


def test_the_bias_moves_in_every_step_and_is_the_same_on_all_devices(on_eight_devices: OnEightDevices):
    state, metrics = on_eight_devices.after(small_batch(32))
    balance = state["weights"]["blocks"]["experts"]["balance"]
    copies = [np.asarray(shard.data) for shard in balance.addressable_shards]
    assert set(np.unique(copies[0])) <= {-0.125, 0.0, 0.125}
    assert (copies[0] > 0).any()
    assert (copies[0] < 0).any()
    assert len(copies) == 8
    assert all((copy == copies[0]).all() for copy in copies)
    assert float(metrics["expert_load_most"]) > 1


def test_the_same_bits_twice(on_eight_devices: OnEightDevices):
    one, other = (jax.device_get(on_eight_devices.after(small_batch(32))) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_padding_counts_for_no_expert(on_eight_devices: OnEightDevices):
    batch = small_batch(32)
    other = {name: x.copy() for name, x in batch.items()}
    other["tokens"][-1, 8:] = (other["tokens"][-1, 8:] + 7) % 300
    assert (batch["segment_ids"][-1, 8:] == 0).all()
    one, two = (jax.device_get(on_eight_devices.after(tokens)) for tokens in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_jit_sees_no_token_dropped_however_unbalanced(on_eight_devices: OnEightDevices):
    """A bias sends all tokens to the experts of one shard of four, which has blocks for a quarter."""
    loads = on_eight_devices.after(small_batch(32), router_bias=50.0)[1]
    assert float(loads["dead_experts"]) == 6
    assert float(loads["expert_load_most"]) == pytest.approx(4)


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
