"""Floors of Llama 2 7B's widths in several forms, each compiled alone for one TPU.

    python -m tests.benchmarks.floors [FORM ...] [--topology=v5e:2x2]

A form is compiled forward and backward for 2 rows of 4,096 positions on each chip, whose weights are whole there: so
nothing is sent. Its figure is the sum of the compiler's cycles without the attention kernels, which all forms of a
floor share. Needs the extra plan; a minute a form. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.devices.xla import OPTIONS
from train.planning.operations import walked
from train.planning.reader import read_program
from train.planning.speed import own_seconds
from train.planning.topology import parse_topology, topology_devices

B, T, D, H, C, F = 2, 4096, 4096, 32, 128, 11008
BF16, F32 = jnp.bfloat16, jnp.float32
ANGLES_TC = np.arange(T)[:, None] * 10_000.0 ** -(np.arange(0, C, 2) / C)
Weights = dict[str, tuple[int, ...]]


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=F32).astype(BF16)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate.astype(F32)).astype(BF16) * up


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Splash attention over each row, [B, H, T, C]."""
    sides = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), 1024)
    computed = dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), 512)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * H),
        block_sizes=kernels.BlockSizes(**sides, **computed, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
    )
    return jax.vmap(kernel)(q, k, v)


def with_its_gradient(rotated: Callable[[jax.Array, int], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A rotation whose gradient is the rotation by the opposite angle."""
    rotate = jax.custom_vjp(lambda x: rotated(x, 1))
    rotate.defvjp(lambda x: (rotated(x, 1), None), lambda _, slope: (rotated(slope, -1),))
    return rotate


def rotated(swapped: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, int], jax.Array]:
    """The rotation of [B, H, T, C], given how the halves of C are exchanged."""
    cosines, sines = np.tile(np.cos(ANGLES_TC), 2), np.concatenate([-np.sin(ANGLES_TC), np.sin(ANGLES_TC)], 1)
    to = lambda x, sign: (x.astype(F32) * cosines.astype(F32) + swapped(x) * sign * sines.astype(F32)).astype(BF16)
    return to


def rotated_columns(x_BHCT: jax.Array, sign: int) -> jax.Array:
    """The rotation of heads whose positions are last."""
    cosines, sines = np.cos(ANGLES_TC.T).astype(F32), sign * np.sin(ANGLES_TC.T).astype(F32)
    first, second = jnp.split(x_BHCT.astype(F32), 2, axis=2)
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], 2).astype(BF16)


by_product = with_its_gradient(
    rotated(lambda x: jnp.einsum("bhtc,cd->bhtd", x, np.roll(np.eye(C), C // 2, 1).astype(BF16)).astype(F32))
)
by_roll = with_its_gradient(rotated(lambda x: jnp.roll(x.astype(F32), C // 2, -1)))
by_columns = with_its_gradient(rotated_columns)


def heads(x: jax.Array, w: dict[str, jax.Array], rotate: Callable[[jax.Array], jax.Array]) -> jax.Array:
    q, k, v = (product("btd,dhc->bhtc", x, w[name]) for name in ("query", "key", "value"))
    return product("bhtc,hcd->btd", attention(rotate(q), rotate(k), v), w["output"])


def heads_in_columns(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    q, k = (product("btd,dhc->bhct", x, w[name]) for name in ("query", "key"))
    q, k = (by_columns(y).swapaxes(2, 3) for y in (q, k))
    return product("bhtc,hcd->btd", attention(q, k, product("btd,dhc->bhtc", x, w["value"])), w["output"])


def heads_of_one_product(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    q, k, v = product("btd,dghc->gbhtc", x, w["query_key_value"])
    return product("bhtc,hcd->btd", attention(by_product(q), by_product(k), v), w["output"])


def feedforward(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    inner = gated(product("btd,df->btf", x, w["gate"]), product("btd,df->btf", x, w["up"]))
    return product("btf,fd->btd", inner, w["down"])


def feedforward_of_one_product(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    both = product("btd,dgf->btgf", x, w["gate_up"])
    return product("btf,fd->btd", gated(both[:, :, 0], both[:, :, 1]), w["down"])


PROJECTIONS: Weights = dict.fromkeys(("query", "key", "value"), (D, H, C)) | {"output": (H, C, D)}
DOWN: Weights = {"down": (F, D)}
FORMS: dict[str, tuple[Callable[..., jax.Array], Weights]] = {
    "gate, up": (feedforward, DOWN | dict.fromkeys(("gate", "up"), (D, F))),
    "gate and up in one product": (feedforward_of_one_product, DOWN | {"gate_up": (D, 2, F)}),
    "query, key, value; halves swapped by a product": (lambda x, w: heads(x, w, by_product), PROJECTIONS),
    "query, key and value in one product": (
        heads_of_one_product,
        {"query_key_value": (D, 3, H, C), "output": (H, C, D)},
    ),
    "halves swapped by moving them": (lambda x, w: heads(x, w, by_roll), PROJECTIONS),
    "halves apart, positions last": (heads_in_columns, PROJECTIONS),
    "nothing rotated": (lambda x, w: heads(x, w, lambda y: y), PROJECTIONS),
}


def milliseconds(topology: str, form: str) -> float:
    """The compiler's time of a form forward and backward, without attention kernels."""
    chip, _ = parse_topology(topology)
    devices = topology_devices(topology)
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
    function, shapes = FORMS[form]

    def both_ways(x: jax.Array, slope: jax.Array, weights: dict[str, jax.Array]) -> Any:
        y, pull = jax.vjp(function, x, weights)
        x_slope, slopes = pull(slope)
        return y, x_slope, {name: slope[None] for name, slope in slopes.items()}

    rows, whole = PartitionSpec("fsdp"), PartitionSpec()
    array = lambda shape, spec: jax.ShapeDtypeStruct(shape, BF16, sharding=NamedSharding(mesh, spec))
    x = array((B * len(devices), T, D), rows)
    weights = {name: array(shape, whole) for name, shape in shapes.items()}
    on_each = jax.shard_map(both_ways, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows, check_vma=False)
    lowered = jax.jit(on_each).lower(x, x, weights)
    text = lowered.compile(compiler_options=OPTIONS["tpu"] | OPTIONS.get(chip.name, {})).as_text()
    operations = walked(read_program(text, {"fsdp": len(devices)}).operations)
    return 1e3 * sum(own_seconds(operation, chip) * times for operation, times in operations if not operation.kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", metavar="FORM", help="; ".join(FORMS))
    parser.add_argument("--topology", default="v5e:2x2")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = {}
    for form in arguments.forms or FORMS:
        found[form] = milliseconds(arguments.topology, form)
        print(f"{form:50} {found[form]:8.2f} ms", flush=True)
    print(json.dumps({"jax": jax.__version__, "topology": arguments.topology, "milliseconds": found}))


if __name__ == "__main__":
    main()
