"""The experts' feed-forward on a CPU: that of a dense masked reference, in time that grows with the choices alone."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.feedforward.experts_on_cpu as experts_on_cpu_module
from model.feedforward.dense import activate
from model.feedforward.experts_on_cpu import LARGEST_TILE, UNIT, Weights, experts_on_cpu

E, N, k, D, F = 4, 160, 2, 24, 16


def drawn(ids: np.ndarray, biased: bool = False, dtype: str = "float32", widths: tuple[int, int] = (D, F)) -> tuple:
    """Arguments of `experts_on_cpu` after the activation, and a gradient of its result."""
    D, F = widths
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    biases = (normal(E, 2 * F), normal(E, D)) if biased else (None, None)
    experts = Weights(normal(E, D, 2 * F) * D**-0.5, normal(E, F, D) * F**-0.5, *biases)
    weights = jnp.asarray(random.random(ids.shape), jnp.float32)
    return (normal(len(ids), D), jnp.asarray(ids), weights, experts), normal(len(ids), D)


def random_ids(N: int = N, k: int = k) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.stack([random.permutation(E)[:k] for _ in range(N)]).astype(np.int32)


def reference(activation: str, x_ND, ids_Nk, weights_Nk, experts: Weights, first_expert: int = 0) -> jax.Array:
    """All experts of all tokens in float32, times the weights of those that were chosen."""
    x_ND, experts = jax.tree.map(lambda array: array.astype(jnp.float32), (x_ND, experts))
    chosen_NkE = ids_Nk[:, :, None] - first_expert == jnp.arange(E)
    weight_NE = jnp.sum(chosen_NkE * weights_Nk[:, :, None], axis=1)
    multiply = partial(jnp.einsum, precision="highest")
    hidden_NEG = multiply("nd,edg->neg", x_ND, experts.gate_up_EDG)
    if experts.gate_up_bias_EG is not None:
        hidden_NEG += experts.gate_up_bias_EG
    hidden_NEF = activate(activation, *jnp.split(hidden_NEG, 2, axis=2))
    y_NED = multiply("nef,efd->ned", hidden_NEF, experts.down_EFD)
    if experts.down_bias_ED is not None:
        y_NED += experts.down_bias_ED
    return multiply("ned,ne->nd", y_NED, weight_NE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(function, activation: str, arguments: tuple, dy_ND: jax.Array, first_expert: int) -> tuple:
    x_ND, ids_Nk, *others = arguments
    of = lambda x_ND, *others: function(activation, x_ND, ids_Nk, *others, first_expert)
    y_ND, pull = jax.vjp(of, x_ND, *others)
    return y_ND, pull(dy_ND.astype(y_ND.dtype))


def with_gradients(function, activation: str, arguments: tuple, dy_ND: jax.Array, first_expert: int = 0) -> list:
    """Returns y and the gradients of x, the weights and the experts."""
    return jax.tree.leaves(_with_gradients(function, activation, arguments, dy_ND, first_expert))


def check(activation: str, arguments: tuple, dy_ND: jax.Array, first_expert: int = 0, tolerance: float = 2e-6) -> list:
    actual = with_gradients(experts_on_cpu, activation, arguments, dy_ND, first_expert)
    expected = with_gradients(reference, activation, arguments, dy_ND, first_expert)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        other = np.asarray(other, np.float32)
        assert np.max(np.abs(np.asarray(one, np.float32) - other)) <= tolerance * np.max(np.abs(other))
    return actual


@pytest.mark.parametrize(("activation", "biased"), [("silu", False), ("clamped_swiglu", True)])
def test_y_and_all_gradients_are_those_of_the_dense_reference(activation: str, biased: bool):
    check(activation, *drawn(random_ids(), biased))


def test_a_feed_forward_wider_than_the_model_has_the_same_gradients():
    check("silu", *drawn(random_ids(), widths=(16, 24)))


def test_experts_that_nobody_chose_have_no_gradient():
    ids = np.where(random_ids() < 2, 0, 2).astype(np.int32)
    *_, of_gate_up, of_down = check("silu", *drawn(ids))
    assert not np.any(of_gate_up[1])
    assert not np.any(of_down[3])


def test_one_expert_may_have_all_rows_in_more_than_one_tile():
    check("silu", *drawn(np.full((LARGEST_TILE * UNIT + 70, 1), 2, np.int32)), tolerance=4e-6)


def test_all_experts_may_be_chosen():
    check("silu", *drawn(random_ids(k=E)))


def test_choices_outside_these_experts_give_nothing():
    ids = random_ids() * 3  # 0, 3, 6, 9, of which the experts are 3 to 6
    actual = check("silu", *drawn(ids), first_expert=3)
    nothing = ~np.any((ids >= 3) & (ids < 3 + E), axis=1)
    assert nothing.any()
    assert not np.any(actual[0][nothing])
    assert not np.any(actual[2][(ids < 3) | (ids >= 3 + E)])


def test_nothing_is_chosen():
    actual = with_gradients(experts_on_cpu, "silu", *drawn(np.full((N, k), E, np.int32)))
    assert not any(np.any(array) for array in actual)


def test_in_bfloat16_y_and_gradients_are_within_its_rounding():
    actual = check("silu", *drawn(random_ids(), biased=True, dtype="bfloat16"), tolerance=2**-6)
    assert [array.dtype.name for array in actual] == ["bfloat16", "bfloat16", "float32"] + 4 * ["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_come_twice(dtype: str):
    arguments, dy_ND = drawn(random_ids(), biased=True, dtype=dtype)
    first, second = (with_gradients(experts_on_cpu, "silu", arguments, dy_ND) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_of_experts_without_rows_nothing_is_read(monkeypatch: pytest.MonkeyPatch):
    """As in generation, where a few tokens choose few of many experts."""
    slots = experts_on_cpu_module._slots(jnp.asarray([[6, 2], [2, 9]]), jnp.ones((2, 2)), jnp.int32(0), 12)
    loop = lambda first, last, body, carry: functools.reduce(lambda c, i: body(i, c), range(first, int(last)), carry)
    monkeypatch.setattr(experts_on_cpu_module.lax, "fori_loop", loop)
    visited = experts_on_cpu_module._over_experts(slots, lambda e, visited: [*visited, int(e)], [])
    assert visited == [2, 6, 9]


def tiles_of(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(expert, first slot, rows) of each tile that runs for experts with so many rows."""
    ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:, None]
    slots = experts_on_cpu_module._slots(jnp.asarray(ids), jnp.ones(ids.shape), jnp.int32(0), len(sizes))
    ran = []

    def loop(first, last, body, carry):
        for i in range(int(first), int(last)):
            carry = body(i, carry)
        return carry

    monkeypatch.setattr(experts_on_cpu_module.lax, "fori_loop", loop)
    for e in range(len(sizes)):
        experts_on_cpu_module._over_tiles(slots, UNIT, e, lambda R, start, _, e=e: ran.append((e, int(start), R)), None)
    return ran


def test_the_rows_that_are_multiplied_are_the_chosen_ones_and_less_than_a_unit_more_for_each_expert(monkeypatch):
    sizes = [0, 1, 63, 64, 65, 512, 513, 1100, 300]
    ran = tiles_of(sizes, monkeypatch)
    multiplied = [sum(R for e, _, R in ran if e == expert) for expert in range(len(sizes))]
    assert multiplied == [-(-size // 64) * 64 for size in sizes]
    # The tiles cover the slots in order, without a gap.
    assert [start for _, start, _ in ran] == np.cumsum([0, *(R for *_, R in ran)])[:-1].tolist()


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_equations(inner)


def test_no_product_is_of_all_rows_and_no_array_has_all_rows_of_all_experts():
    arguments, dy_ND = drawn(random_ids(N=700))
    gradients = lambda *arguments: jax.vjp(lambda *arguments: experts_on_cpu("silu", *arguments), *arguments)[1](dy_ND)
    equations = list(all_equations(jax.make_jaxpr(gradients)(*arguments).jaxpr))
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert max(max(operand.aval.shape) for operand in product.invars) <= LARGEST_TILE * UNIT
    largest = max(value.aval.size for equation in equations for value in equation.outvars)
    # Gate and up of all slots are kept for the backward pass; an expert's last unit may have empty ones.
    assert largest <= (700 * k + 64 * (E + 1)) * 2 * F < E * 700 * k * F
