"""A mixture of experts' feed-forward on a CPU, in time that grows with the chosen experts and not with all of them.

`jax.lax.ragged_dot` multiplies every row by every expert there. Here each expert's rows are multiplied in tiles. A tile
gathers its rows of x and adds its results into y, so that the rows of all choices never exist at once.

Axes: N tokens, k choices of a token, M = N·k choices, P slots, R slots of a tile, G = 2F gate and up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.feedforward.dense import activate

# Rows of a unit, of which a tile has up to LARGEST_TILE. Larger tiles pack the weights less often, smaller ones stay in
# the caches (in bfloat16 4 units take 0.8 of the time of 8), and smaller units leave fewer rows empty. Each size of a
# tile is compiled. Where experts have few rows, units are small.
UNIT, SMALL_UNIT, LARGEST_TILE = 64, 8, 4
FEW_ROWS = 16


class Weights(NamedTuple):
    """The experts' weights.

    Attributes:
        gate_up_EDG: the matrices of gate and up, side by side.
        down_EFD: the matrices back to the model's width.
        gate_up_bias_EG: the biases of gate and up, or None.
        down_bias_ED: the biases of the result, or None.
    """

    gate_up_EDG: jax.Array
    down_EFD: jax.Array
    gate_up_bias_EG: jax.Array | None = None
    down_bias_ED: jax.Array | None = None


class Slots(NamedTuple):
    """The choices sorted by expert; each expert's rows fill whole units, the last of which may have empty slots.

    Attributes:
        start_E: each expert's first slot.
        padded_E: each expert's slots.
        choice_P: the choice in each slot, a position in the flat ids; M in an empty slot.
        token_P: the token of that choice; 0 in an empty slot.
        weight_P: the router's weight of that choice; 0 in an empty slot, which makes all of its effects zero.
    """

    start_E: jax.Array
    padded_E: jax.Array
    choice_P: jax.Array
    token_P: jax.Array
    weight_P: jax.Array


def experts_on_cpu(
    activation: str,
    x_ND: jax.Array,
    ids_Nk: jax.Array,
    weights_Nk: jax.Array,
    experts: Weights,
    first_expert: jax.Array | int = 0,
) -> jax.Array:
    """Returns the sum of the chosen experts' outputs, each times the router's weight, [N, D] in the dtype of x.

    Products are summed in float32. The same inputs give the same bits.

    Args:
        activation: a key of `model.feedforward.dense.ACTIVATIONS`.
        x_ND: the tokens, in the dtype of the experts' weights.
        ids_Nk: the experts that each token chose. Those outside [first_expert, first_expert + E) give nothing.
        weights_Nk: the router's weights, float32.
        first_expert: the id of the first expert in `experts`.
    """
    return _experts(activation, x_ND, ids_Nk, weights_Nk, experts, jnp.asarray(first_expert, jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(activation, x_ND, ids_Nk, weights_Nk, experts, first_expert):  # type: ignore[no-untyped-def]
    slots = _slots(ids_Nk, weights_Nk, first_expert, len(experts.down_EFD))
    return _forward(activation, x_ND, slots, experts, _unit(ids_Nk.size, len(experts.down_EFD)), keep=False)[0]


def _experts_forward(activation, x_ND, ids_Nk, weights_Nk, experts, first_expert):  # type: ignore[no-untyped-def]
    slots = _slots(ids_Nk, weights_Nk, first_expert, len(experts.down_EFD))
    unit = _unit(ids_Nk.size, len(experts.down_EFD))
    y_ND, gate_up_PG = _forward(activation, x_ND, slots, experts, unit, keep=True)
    return y_ND, (x_ND, weights_Nk, slots, gate_up_PG, experts)


def _experts_backward(activation, kept, dy_ND):  # type: ignore[no-untyped-def]
    x_ND, weights_Nk, slots, gate_up_PG, experts = kept
    unit = _unit(weights_Nk.size, len(experts.down_EFD))
    dx_ND, of_weight_P, of_experts = _backward(activation, x_ND, dy_ND, slots, gate_up_PG, experts, unit)
    of_weight_M = jnp.zeros(weights_Nk.size, jnp.float32).at[slots.choice_P].set(of_weight_P, mode="drop")
    return dx_ND, None, of_weight_M.reshape(weights_Nk.shape).astype(weights_Nk.dtype), of_experts, None


_experts.defvjp(_experts_forward, _experts_backward)


def _slots(ids_Nk: jax.Array, weights_Nk: jax.Array, first_expert: jax.Array, E: int) -> Slots:
    """Sorts the choices by expert."""
    M, k = ids_Nk.size, ids_Nk.shape[1]
    assert (E + 1) * M < 2**31, "expert and choice are sorted as one int32"
    expert_M = ids_Nk.reshape(M).astype(jnp.int32) - first_expert
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)
    # One key that holds both is sorted in a third of the time of a pair.
    sorted_M = lax.sort(expert_M * M + jnp.arange(M, dtype=jnp.int32), is_stable=False)
    bounds = jnp.searchsorted(sorted_M, jnp.arange(E + 1, dtype=jnp.int32) * M).astype(jnp.int32)
    first_E, size_E = bounds[:-1], bounds[1:] - bounds[:-1]
    unit = _unit(M, E)
    padded_E = -(-size_E // unit) * unit
    end_E = jnp.cumsum(padded_E)
    start_E = end_E - padded_E
    P = -(-(M + E * (unit - 1)) // unit) * unit
    slot_P = jnp.arange(P, dtype=jnp.int32)
    expert_P = jnp.minimum(jnp.searchsorted(end_E, slot_P, side="right"), E - 1)
    within_P = slot_P - start_E[expert_P]
    filled_P = within_P < size_E[expert_P]
    choice_P = sorted_M[jnp.minimum(first_E[expert_P] + within_P, M - 1)] % M
    weight_P = jnp.where(filled_P, weights_Nk.reshape(M)[choice_P].astype(jnp.float32), 0)
    token_P = jnp.where(filled_P, choice_P // k, 0)
    return Slots(start_E, padded_E, jnp.where(filled_P, choice_P, M), token_P, weight_P)


def _unit(M: int, E: int) -> int:
    """Returns the rows of which all tiles of M choices of E experts are multiples."""
    return UNIT if M >= FEW_ROWS * E else SMALL_UNIT


def _over_experts(slots: Slots, expert: Callable[..., Any], carry: Any) -> Any:
    """Returns carry after `carry = expert(e, carry)` for each expert that has rows: of others nothing is read."""
    order_E = jnp.argsort(slots.padded_E == 0, stable=True).astype(jnp.int32)
    return lax.fori_loop(0, jnp.sum(slots.padded_E > 0), lambda i, carry: expert(order_E[i], carry), carry)


def _over_tiles(slots: Slots, unit: int, e: jax.Array, tile: Callable[..., Any], carry: Any) -> Any:
    """Returns carry after `carry = tile(R, start, carry)` for each tile of expert e.

    All tiles are as large as can be but the last one, of R rows: a loop for each R, of which one runs once.
    """
    start, padded = slots.start_E[e], slots.padded_E[e]
    largest = min(LARGEST_TILE * unit, len(slots.token_P))
    count, rest = padded // largest, padded % largest
    carry = lax.fori_loop(0, count, lambda i, carry: tile(largest, start + i * largest, carry), carry)
    start += count * largest
    for R in range(unit, largest, unit):
        # The start depends on i, or else XLA would move the products out of the loop and compute them always.
        once = lambda i, carry, R=R: tile(R, start + i * R, carry)
        carry = lax.fori_loop(0, (rest == R).astype(jnp.int32), once, carry)
    return carry


def _forward(
    activation: str, x_ND: jax.Array, slots: Slots, experts: Weights, unit: int, keep: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns y and, if `keep`, the bits of gate and up before the activation."""
    F = experts.down_EFD.shape[1]
    dtype = x_ND.dtype
    x, gate_up, down = _bits(x_ND), _bits(experts.gate_up_EDG), _bits(experts.down_EFD)

    def expert(e: jax.Array, carry: Any) -> Any:
        gate_up_DG, down_FD = _unbits(gate_up[e]), _unbits(down[e])
        bias_G, bias_D = _biases(experts, e)

        def tile(R: int, start: jax.Array, carry: Any) -> Any:
            y_ND, kept_PG = carry
            token_R, weight_R = _rows_from(slots.token_P, start, R), _rows_from(slots.weight_P, start, R)
            gate_up_RG = _dot(_gather(x, token_R), gate_up_DG, 1, 0)
            gate_up_RG = (gate_up_RG if bias_G is None else gate_up_RG + bias_G).astype(dtype)
            if keep:
                kept_PG = _write(kept_PG, _bits(gate_up_RG), start)
            h_RF = activate(activation, *_gate_and_up(gate_up_RG)) * weight_R[:, None]
            y_RD = _dot(h_RF.astype(dtype), down_FD, 1, 0)
            if bias_D is not None:
                y_RD += weight_R[:, None] * bias_D
            return y_ND.at[token_R].add(y_RD, mode="promise_in_bounds"), kept_PG

        return _over_tiles(slots, unit, e, tile, carry)

    kept_PG = jnp.zeros((len(slots.token_P), 2 * F), x.dtype) if keep else None
    y_ND, kept_PG = _over_experts(slots, expert, (jnp.zeros(x_ND.shape, jnp.float32), kept_PG))
    return y_ND.astype(dtype), kept_PG


def _backward(
    activation: str, x_ND: jax.Array, dy_ND: jax.Array, slots: Slots, gate_up_PG: jax.Array, experts: Weights, unit: int
) -> tuple[jax.Array, jax.Array, Weights]:
    """Returns the gradients of x, of the weight in each slot, and of the experts."""
    E, F, D = experts.down_EFD.shape
    dtype = x_ND.dtype
    x, dy = _bits(x_ND), _bits(dy_ND)
    gate_up, down = _bits(experts.gate_up_EDG), _bits(experts.down_EFD)

    def expert(e: jax.Array, carry: Any) -> Any:
        dx_ND, of_weight_P, written = carry
        gate_up_DG, down_FD = _unbits(gate_up[e]), _unbits(down[e])
        bias_G, bias_D = _biases(experts, e)

        def tile(R: int, start: jax.Array, carry: Any) -> Any:
            dx_ND, of_weight_P, sums = carry
            token_R, weight_R = _rows_from(slots.token_P, start, R), _rows_from(slots.weight_P, start, R)
            x_RD, dy_RD = _gather(x, token_R), _gather(dy, token_R)
            act_RF, pull = jax.vjp(
                partial(activate, activation), *_gate_and_up(_unbits(_rows_from(gate_up_PG, start, R)))
            )
            of_h_RF = _dot(dy_RD, down_FD, 1, 1)
            of_weight_R = jnp.sum(act_RF * of_h_RF, axis=1)
            h_RF = (act_RF * weight_R[:, None]).astype(dtype)
            halves = [_bits(half_RF.astype(dtype)) for half_RF in pull(of_h_RF * weight_R[:, None])]
            of_gate_up_RG = _unbits(jnp.concatenate(halves, axis=1))
            # The narrower of h and dy is transposed.
            of_down = (h_RF, dy_RD) if F <= D else (dy_RD, h_RF)
            sums = [sums[0] + _summed_over_rows(x_RD, of_gate_up_RG), sums[1] + _summed_over_rows(*of_down), *sums[2:]]
            if bias_G is not None:
                sums[2] += jnp.sum(of_gate_up_RG.astype(jnp.float32), axis=0)
            if bias_D is not None:
                of_weight_R += _dot(dy_RD.astype(jnp.float32), bias_D, 1, 0)
                sums[3] += _dot(weight_R, dy_RD.astype(jnp.float32), 0, 0)
            dx_ND = dx_ND.at[token_R].add(_dot(of_gate_up_RG, gate_up_DG, 1, 1), mode="promise_in_bounds")
            return dx_ND, _write(of_weight_P, of_weight_R, start), sums

        none = [jnp.zeros((D, 2 * F)), jnp.zeros((F, D) if F <= D else (D, F)), jnp.zeros(2 * F), jnp.zeros(D)]
        dx_ND, of_weight_P, sums = _over_tiles(slots, unit, e, tile, (dx_ND, of_weight_P, none))
        sums[1] = sums[1] if F <= D else sums[1].T
        written = [_write(all_E, _bits(of_e.astype(dtype))[None], e) for all_E, of_e in zip(written, sums, strict=True)]
        return dx_ND, of_weight_P, written

    zeros = [jnp.zeros((E, *shape), x.dtype) for shape in ((D, 2 * F), (F, D), (2 * F,), (D,))]
    carry = jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(len(slots.token_P), jnp.float32), zeros
    dx_ND, of_weight_P, written = _over_experts(slots, expert, carry)
    of_experts = [
        None if array is None else _unbits(gradient.reshape(array.shape))
        for array, gradient in zip(experts, written, strict=True)
    ]
    return dx_ND.astype(dtype), of_weight_P, Weights(*of_experts)  # type: ignore[arg-type]


def _biases(experts: Weights, e: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the biases of expert e, [G] and [D] in float32, where there are any."""
    of_gate_up, of_down = experts.gate_up_bias_EG, experts.down_bias_ED
    return (
        None if of_gate_up is None else of_gate_up.astype(jnp.float32)[e],
        None if of_down is None else of_down.astype(jnp.float32)[e],
    )


def _gate_and_up(gate_up_RG: jax.Array) -> list[jax.Array]:
    return jnp.split(gate_up_RG.astype(jnp.float32), 2, axis=1)


def _bits(x: jax.Array) -> jax.Array:
    """Returns bfloat16 x as uint16; XLA's CPU compiler slices and gathers bfloat16 by way of a float32 copy of all."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _unbits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _rows_from(x: jax.Array, start: jax.Array, R: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, R)


def _write(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _gather(x: jax.Array, index_R: jax.Array) -> jax.Array:
    return _unbits(x.at[index_R].get(mode="promise_in_bounds"))


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Returns the product of two matrices, or of one and a vector, summed in float32."""
    return lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _summed_over_rows(x_RD: jax.Array, y_RF: jax.Array) -> jax.Array:
    """Returns xᵀy [D, F], summed in float32.

    With an axis of 1 XLA's CPU compiler transposes x first. It would multiply two matrices as they are, by a kernel
    that is slower, and has no bfloat16.
    """
    x_D1R = jnp.transpose(x_RD[None], (2, 0, 1))
    return lax.dot_general(x_D1R, y_RF[None], (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
