"""Mixtures of experts next to a reference in which every expert computes every token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.feedforward.experts
from launch.presets import load_config
from model.config import ModelConfig
from model.feedforward.balance import fullest_shard, load_figures, moved_bias, routing_loss
from model.feedforward.dense import activate
from model.feedforward.experts import Experts
from model.feedforward.grouped import product_by
from model.feedforward.router import Routing
from model.parameters import count_parameters, parameter_table, parameters_text
from model.sharding import UNSHARDED
from tests.benchmarks.meshes import ROUTERS
from tests.small import mesh_of, small_model, small_weights
from train.devices.rules import GENERATION, TRAINING

E, B, T = 8, 2, 24
# How a device computes: a CPU's own way, and that of accelerators, here with a product that is known to be right, where
# gate and up are joined or apart.
WAYS = ("cpu", "accelerator", "apart")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "cpu":
        apart = request.param == "apart"
        monkeypatch.setattr(model.feedforward.experts, "_apart", lambda weight: apart and weight.shape[2] == 2)
        monkeypatch.setattr(model.feedforward.experts, "platform", lambda: "other")
        monkeypatch.setattr(model.feedforward.experts, "grouped_product", product_with_undefined_rows)


def poisoned(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(len(rows)) < jnp.sum(sizes))[:, None], rows, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def product_with_undefined_rows(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    dtype: Any = None,
    expected: int | None = None,
    transposed: bool = False,
) -> jax.Array:
    """A grouped product of which rows without an expert are NaN, and so is their gradient."""
    return poisoned(product_by("ragged", x, w, sizes, dtype, expected, transposed), sizes)


def _backward(_: Any, expected: int | None, transposed: bool, kept: tuple[jax.Array, ...], dy: jax.Array) -> Any:
    x, w, sizes = kept
    product = lambda x, w: product_by("ragged", x, w, sizes, None, expected, transposed)
    dx, dw = jax.vjp(product, x, w)[1](dy)
    return poisoned(dx, sizes), dw, None


product_with_undefined_rows.defvjp(lambda *operands: (product_with_undefined_rows(*operands), operands[:3]), _backward)


def floor(**changes: Any) -> tuple[Any, dict[str, jax.Array]]:
    """A config, and the weights of its last layer's experts."""
    config = small_model(**{"num_experts": E, "expert_dim": 24} | changes)
    assert config.problems() == []
    weights = jax.tree.map(lambda w: w[-1], small_weights(config)["blocks"]["experts"])
    # Scores differ as much as the biases that balance them, so that each token has groups and experts of its own.
    return config, weights | {"router": 8 * weights["router"]}


def inputs(config: Any, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, config.model_dim)), jnp.float32)


def chosen_by_hand(config: Any, weights: dict[str, jax.Array], x: jax.Array) -> np.ndarray:
    """Each expert's weight for each token [N, E], as the papers have it, token by token."""
    affinities = np.asarray(x.reshape(-1, config.model_dim) @ weights["router"], np.float64)
    affinities += np.asarray(weights.get("router_bias", 0.0))
    exponentials = np.exp(affinities - affinities.max(1, keepdims=True))
    scores = (
        1 / (1 + np.exp(-affinities))
        if config.router_score == "sigmoid"
        else exponentials / exponentials.sum(1)[:, None]
    )
    by = (affinities if config.router_score == "softmax_of_chosen" else scores) + np.asarray(
        weights.get("balance", 0.0)
    )
    result = np.zeros_like(scores)
    for token, order_by in enumerate(by):
        groups = order_by.reshape(config.router_groups, -1)
        best_of = np.sort(groups, axis=1)[:, -(2 if config.router_score == "sigmoid" else 1) :].sum(1)
        open_groups = np.argsort(-best_of, kind="stable")[: config.router_groups_per_token]
        allowed = [e for e in np.argsort(-order_by, kind="stable") if e // groups.shape[1] in open_groups]
        ids = allowed[: config.experts_per_token]
        if config.router_score == "softmax_of_chosen":
            of_chosen = np.exp(affinities[token, ids])
            result[token, ids] = of_chosen / of_chosen.sum()
        else:
            total = scores[token, ids].sum() if config.router_normalize else 1.0
            result[token, ids] = scores[token, ids] / total
    return result * config.router_scale


def dense_reference(config: Any, weights: dict[str, Any], x: jax.Array, mix_NE: jax.Array) -> jax.Array:
    x_ND = x.reshape(-1, config.model_dim)
    inner = jnp.einsum("nd,edbf->nebf", x_ND, weights["gate_up"]) + weights.get("gate_up_bias", 0.0)
    hidden = activate.fun(config.activation, inner[:, :, 0], inner[:, :, 1])
    outputs = jnp.einsum("nef,efd->ned", hidden, weights["down"]) + weights.get("down_bias", 0.0)
    y = jnp.einsum("ned,ne->nd", outputs, mix_NE)
    if shared := weights.get("shared"):
        of_all = activate.fun(config.activation, x_ND @ shared["gate"], x_ND @ shared["up"]) @ shared["down"]
        gate = jax.nn.sigmoid(x_ND @ weights["shared_gate"]) if "shared_gate" in weights else jnp.ones(len(x_ND))
        y = y + of_all * gate[:, None]
    return y.reshape(x.shape)


@functools.cache
def by_hand(router: str) -> jax.Array:
    """The sum of each token's experts, chosen and computed as the papers have it."""
    config, weights = floor(**ROUTERS[router])
    x = inputs(config)
    mix_NE = jnp.asarray(chosen_by_hand(config, weights, x), jnp.float32)
    return jax.jit(lambda x: dense_reference(config, weights, x, mix_NE))(x)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.usefixtures("way")
def test_each_token_gets_the_sum_of_its_experts(router: str):
    config, weights = floor(**ROUTERS[router])
    actual = jax.jit(lambda x: Experts(config, weights, UNSHARDED)(x)[0])(inputs(config))
    expected = by_hand(router)
    np.testing.assert_allclose(actual, expected, atol=3e-6 * float(jnp.abs(expected).max()))


@functools.cache
def reference_gradients(router: str) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradients of weights and x where every expert computes every token."""
    config, weights = floor(**ROUTERS[router])
    x, slope = inputs(config), inputs(config, 1)

    def mix(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        floor = Experts(config, weights, UNSHARDED)
        ids, of_chosen, _ = floor.router(x, None)
        return jnp.sum((ids[..., None] == jnp.arange(E)) * of_chosen[..., None], axis=2).reshape(-1, E)

    reference = lambda weights, x: jnp.vdot(dense_reference(config, weights, x, mix(weights, x)), slope)
    return jax.jit(jax.grad(reference, argnums=(0, 1)))(weights, x)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.usefixtures("way")
def test_gradients_are_those_of_the_reference(router: str):
    config, weights = floor(**ROUTERS[router])
    x, slope = inputs(config), inputs(config, 1)
    actual = lambda weights, x: jnp.vdot(Experts(config, weights, UNSHARDED)(x)[0], slope)
    of_floor = jax.jit(jax.grad(actual, argnums=(0, 1)))(weights, x)
    for one, other in zip(*map(jax.tree.leaves, (of_floor, reference_gradients(router))), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6 * float(jnp.abs(other).max()))


def with_gradient(experts: Any) -> Any:
    """Returns a function of x that gives y, the routing, and the gradient of the sum of y²."""

    def both(x: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        y, pull, routing = jax.vjp(experts, x, has_aux=True)
        return y, routing, *pull(2 * y)

    return both


@pytest.mark.parametrize("expert", [1, 4])
@pytest.mark.usefixtures("way")
def test_all_tokens_of_one_expert_and_experts_without_tokens(expert: int):
    """On four devices all rows are then on one, which computes several blocks."""
    config, weights = floor(experts_per_token=1, router_bias=True, feedforward_bias=True)
    weights |= {"router_bias": jnp.where(jnp.arange(E) == 5, 100.0, 0.0)}
    x = jnp.tile(inputs(config), (2, 1, 1))
    with jax.set_mesh(mesh_of(expert=expert)):
        table = parameter_table(config)
        axes = {name: list(table[f"blocks.experts.{name}"].axes)[1:] for name in weights}
        of_mesh = {name: TRAINING.reshard(w, *axes[name]) for name, w in weights.items()}
        placed = TRAINING.reshard(x, "batch", "sequence", None)
        experts = lambda x: Experts(config, of_mesh, TRAINING)(x, jnp.ones_like(x[..., 0], dtype=bool))
        y, routing, gradient = jax.jit(with_gradient(experts))(placed)
    mix_NE = jnp.tile(jnp.eye(E)[5], (x.shape[0] * T, 1))
    reference = lambda x: (dense_reference(config, weights, x, mix_NE), None)
    expected, _, expected_gradient = jax.jit(with_gradient(reference))(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 * float(jnp.abs(expected_gradient).max()))
    np.testing.assert_array_equal(jnp.sum(routing.load_BE, 0), x.shape[0] * T * jnp.eye(E)[5])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [{"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_one_token_is_computed_on_a_mesh_that_generates(shape: dict[str, int]):
    """All devices have it, and each adds what its experts, or its part of their width, give."""
    config, weights = floor(feedforward_bias=True)
    x = inputs(config)[:1, :1]
    with jax.set_mesh(mesh_of(**shape)):
        table = parameter_table(config)
        axes = {name: list(table[f"blocks.experts.{name}"].axes)[1:] for name in weights}
        of_mesh = {name: GENERATION.reshard(w, *axes[name]) for name, w in weights.items()}
        placed = GENERATION.reshard(x, "batch", "sequence", None)
        y = jax.jit(lambda x: Experts(config, of_mesh, GENERATION)(x)[0])(placed)
    mix_NE = jnp.asarray(chosen_by_hand(config, weights, x), jnp.float32)
    expected = jax.jit(lambda x: dense_reference(config, weights, x, mix_NE))(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_of_equal_scores_the_first_expert_is_chosen():
    config, weights = floor(experts_per_token=3)
    weights |= {"router": jnp.zeros_like(weights["router"])}
    ids, of_chosen, _ = jax.jit(lambda x: Experts(config, weights, UNSHARDED).router(x, None))(inputs(config))
    np.testing.assert_array_equal(ids, jnp.tile(jnp.arange(3), (B, T, 1)))
    np.testing.assert_allclose(of_chosen, 1 / 3, rtol=1e-6)


def test_a_router_works_in_float32_whatever_the_floor_computes_in():
    config, weights = floor(compute_dtype="bfloat16")
    x = inputs(config).astype(jnp.bfloat16)
    _, of_chosen, _ = Experts(config, weights, UNSHARDED).router(x, None)
    exact = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(weights["router"], np.float64)
    expected = np.sort(np.exp(exact) / np.exp(exact).sum(-1, keepdims=True), -1)[..., -2:][..., ::-1]
    np.testing.assert_allclose(of_chosen, expected / expected.sum(-1, keepdims=True), rtol=2e-6)


def routing(load: Any, score: Any, z: Any = None) -> Routing:
    load = jnp.asarray(load, jnp.float32)
    return Routing(load, jnp.asarray(score, jnp.float32), jnp.zeros(load.shape[:2]) if z is None else jnp.asarray(z))


def test_the_balance_loss_is_one_in_balance_and_counts_rows_or_the_batch():
    """Two rows of four tokens with k = 2, each with all tokens in two experts of four: in balance only together."""
    apart = routing([[[4, 4, 0, 0], [0, 0, 4, 4]]], [[[2, 2, 0, 0], [0, 0, 2, 2]]])
    config = small_model(num_experts=4, balance_loss=1.0)
    by_row = small_model(num_experts=4, balance_loss=1.0, balance_over="row")
    load = jnp.sum(apart.load_BE, axis=1)
    assert float(routing_loss(config, apart, load, jnp.float32(8))) == pytest.approx(1)
    assert float(routing_loss(by_row, apart, load, jnp.float32(8))) == pytest.approx(2)
    with_z = apart._replace(z_B=jnp.asarray([[3.0, 5.0]]))
    of_z = small_model(num_experts=4, balance_loss=0.0, router_z_loss=0.5)
    assert float(routing_loss(of_z, with_z, load, jnp.float32(8))) == pytest.approx(0.5)


def test_the_bias_moves_by_the_rate_against_the_load():
    config = small_model(num_experts=4, balance_bias=True, balance_rate=0.25, balance_loss=0.0)
    moved = moved_bias(config, jnp.zeros((1, 4)), jnp.asarray([[0.0, 2.0, 1.0, 5.0]]))
    np.testing.assert_array_equal(moved, [[0.25, 0.0, 0.25, -0.25]])


def test_figures_of_a_load():
    figures = load_figures(jnp.asarray([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]]))
    np.testing.assert_allclose(figures["most"], [1, 4, 2])
    np.testing.assert_allclose(figures["least"], [1, 0, 0])
    np.testing.assert_allclose(figures["entropy"], [1, 0, 0.5], atol=1e-6)
    np.testing.assert_array_equal(figures["dead"], [0, 3, 2])


def test_the_fullest_shard_is_that_of_its_own_group_of_rows():
    """Two groups of one row: the first has all tokens in experts 0 and 1, the second is in balance."""
    load_LGE = jnp.asarray([[[4.0, 4.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]])
    np.testing.assert_allclose(fullest_shard(load_LGE, shards=2), [2.0])
    np.testing.assert_allclose(fullest_shard(load_LGE.sum(1, keepdims=True), shards=2), [1.5])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"experts_per_token": 9}, "model.num_experts = 8 is below model.experts_per_token = 9"),
        ({"gated": False}, "experts are gated"),
        ({"dense_layers": 2}, "leave no layer with experts"),
        ({"layer_pattern": "f"}, "leave no layer with experts"),
        ({"num_experts": None, "layer_pattern": "Ff"}, "small letters are dense layers among experts"),
        ({"router_groups": 3}, "does not divide by model.router_groups = 3"),
        ({"router_groups": 4, "experts_per_token": 3}, "have too few experts for model.experts_per_token = 3"),
        ({"router_score": "softmax_of_chosen", "balance_bias": True}, "model.balance_bias has no effect"),
        ({"balance_rate": 0.1}, "model.balance_rate has no effect with no model.balance_bias"),
        ({"num_experts": None, "expert_dim": 8}, "model.expert_dim has no effect with no model.num_experts"),
        ({"shared_expert_gate": True}, "model.shared_expert_gate has no effect"),
        ({"balance_loss": 0.0, "balance_over": "row"}, "model.balance_over has no effect"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_experts_is_said(changes: dict[str, Any], problem: str):
    values = {"num_layers": 2, "num_experts": 8} | changes
    assert problem in "\n".join(ModelConfig(**values).problems())


@pytest.mark.parametrize(
    ("preset", "active"),
    [("mixtral_8x7b", 12_879_925_248), ("olmoe_1b_7b", 1_282_017_280), ("qwen3_30b_a3b", 3_353_032_704)],
)
def test_the_parameters_of_a_token_are_those_that_were_published(preset: str, active: int):
    config = load_config(preset, {})
    model = config.resolved(config.tokenizer.vocab_size).model
    assert count_parameters(model, active=True) == active
    assert parameters_text(model) == f"{count_parameters(model):,} ({active:,} for a token)"
