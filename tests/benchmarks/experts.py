"""The experts' feed-forward on a CPU beside a dense one that does as many operations for each token.

    python -m tests.benchmarks.experts [--rounds=8]

Each case is a forward and backward pass in one process, the two sides taking turns; the figure is the least time of
the processor's cores. The experts' side includes the sorting and gathering of rows, and the sum over the chosen
experts, but not the router. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.feedforward.dense import activate
from model.feedforward.experts_on_cpu import Weights, experts_on_cpu
from model.product import product
from train.devices.mesh import one_device_mesh


class Case(NamedTuple):
    """Sizes of a feed-forward; `skew` subtracts skew · log(1 + e) from the router's logit of expert e."""

    E: int
    k: int
    D: int
    F: int
    N: int
    skew: float = 0.0


CASES = {
    "8 experts, 2 chosen": Case(8, 2, 256, 704, 2048),
    "64 experts, 8 chosen": Case(64, 8, 384, 192, 4096),
    "64 experts, 8 chosen, skewed": Case(64, 8, 384, 192, 4096, skew=1.2),
    "64 experts, 8 chosen, wider": Case(64, 8, 512, 192, 2048),
}


def dense(x_ND: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    x_BTD = x_ND[None]
    gate_BTF, up_BTF = product("btd,df->btf", x_BTD, gate_DF), product("btd,df->btf", x_BTD, up_DF)
    return product("btf,fd->btd", activate("silu", gate_BTF, up_BTF), down_FD)[0]


def sides(case: Case, dtype: str) -> tuple[dict[str, tuple[Callable[..., Any], tuple]], np.ndarray]:
    """Returns a step of each side with its arguments, and the rows that each expert has."""
    E, k, D, F, N, skew = case
    random = np.random.default_rng(0)
    normal = lambda *shape, scale=1.0: jnp.asarray(random.normal(size=shape) * scale, dtype)
    x_ND, dy_ND = normal(N, D), normal(N, D)
    # Hidden states share a direction, so that some experts are more popular from the start.
    hidden = np.asarray(x_ND, np.float32) + 0.7 * random.normal(size=D)
    logits_NE = hidden @ random.normal(size=(D, E)) * D**-0.5 - skew * np.log(np.arange(1, E + 1))
    weights_Nk, ids_Nk = jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits_NE, jnp.float32)), k)
    experts = Weights(normal(E, D, 2 * F, scale=D**-0.5), normal(E, F, D, scale=F**-0.5))
    wide = [normal(D, k * F, scale=D**-0.5), normal(D, k * F, scale=D**-0.5), normal(k * F, D, scale=F**-0.5)]

    def of_dense(dy_ND, *arguments):
        y_ND, pull = jax.vjp(dense, *arguments)
        return y_ND, pull(dy_ND)

    def of_experts(dy_ND, ids_Nk, *arguments):
        chosen = lambda x_ND, weights_Nk, experts: experts_on_cpu("silu", x_ND, ids_Nk, weights_Nk, experts)
        y_ND, pull = jax.vjp(chosen, *arguments)
        return y_ND, pull(dy_ND)

    both = {
        "dense": (jax.jit(of_dense), (dy_ND, x_ND, *wide)),
        "experts": (jax.jit(of_experts), (dy_ND, ids_Nk, x_ND, weights_Nk, experts)),
    }
    return both, np.bincount(np.asarray(ids_Nk).reshape(-1), minlength=E)


def measure(case: Case, dtype: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds of each side, and the fewest and most rows of an expert."""
    both, sizes = sides(case, dtype)
    seconds: dict[str, list[float]] = {side: [] for side in both}
    for _ in range(rounds + 1):
        for side, (step, arguments) in both.items():
            start = time.process_time()
            jax.block_until_ready(step(*arguments))
            seconds[side].append(time.process_time() - start)
    # The first round compiles.
    return {side: min(times[1:]) for side, times in seconds.items()} | {"rows": [int(sizes.min()), int(sizes.max())]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    figures = {}
    print(f"{'':42}{'rows of an expert':>18}{'dense':>10}{'experts':>10}{'ratio':>7}")
    with jax.set_mesh(one_device_mesh()):
        for dtype in ("float32", "bfloat16"):
            for name, case in CASES.items():
                row = measure(case, dtype, arguments.rounds)
                row["ratio"] = row["experts"] / row["dense"]
                figures[f"{name}, {dtype}"] = row
                rows = " to ".join(map(str, row["rows"]))
                times = f"{row['dense'] * 1e3:7.0f} ms{row['experts'] * 1e3:7.0f} ms"
                print(f"{name + ', ' + dtype:42}{rows:>18}{times}{row['ratio']:7.2f}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
