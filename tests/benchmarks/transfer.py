"""Does the best learning rate of a small model hold for a wide one: sweeps over widths, under standard and under mup.

    python -m tests.benchmarks.transfer --to=FOLDER [--widths=64,128,256,512] [--optimizers=adamw,muon] [--steps=400]
        [--rows=16] [--parametrizations=standard,mup] [--swept=all|matrices|others]

Models of 2 layers with heads of 32 read the same tokens of the default corpus. Rates are powers of √2 times an
optimizer's FIRST: two on each side of it for the first width, for another those about the best of the one before and
the first's best, and then what is missing next to the best one, until nothing is. The best rate of a width lies on the
parabola through the best point and its neighbours, over the logarithm of the rate. Under mup the rate is that of the
first width, which is the base. --swept sweeps the rate of Muon's matrices alone, or that of the others, which AdamW
updates (embedding, unembedding and norms); the rest has the rate of KEPT, about the best of the first width.

Bits a byte are of held-out documents, at a run's end. The runs are ordinary ones in FOLDER/OPTIMIZER-PARAMETRIZATION-
WIDTH-POWER-SEED: the same command again goes on where it stopped. The last line is one JSON object, with the ratio of
the largest to the smallest best rate by optimizer and parametrization.
"""

import argparse
import json
import math
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tests.benchmarks.learning import train
from train.run.step_log import held_out_figure

# Near the best rates at width 64.
FIRST = {"adamw": 2**-7, "muon": 2**-6}
# The rates of what is not swept, and what AdamW updates where the optimizer is Muon.
KEPT = {"matrices": 0.016, "others": 0.06}
OTHERS = ("embedding", "unembedding", "vector")
# The most powers of √2 that a sweep goes away from FIRST.
FARTHEST = 10
RECIPE = {
    "model.num_layers": "2", "model.head_dim": "32", "model.num_kv_heads": "none", "model.qk_norm": "false",
    "model.scale_embeddings": "false", "tokenizer.vocab_size": "1024", "data.segment_length": "128",
    "data.num_workers": "0", "optimizer.schedule": "linear", "optimizer.muon_momentum": "0.95",
    "optimizer.decay_fraction": "0.2", "optimizer.final_fraction": "0.1", "optimizer.weight_decay": "0.1",
    "optimizer.warmup_steps": "10", "evaluation.max_bytes": "131072",
    "evaluation.loop_bytes": "4096", "evaluation.sample_tokens": "0",
}  # fmt: skip


def fields_of(optimizer: str, parametrization: str, width: int, base: int, steps: int, rows: int) -> dict[str, str]:
    """The settings of a run, but for its rate."""
    sizes = {"model.model_dim": width, "model.num_heads": width // 32, "model.feedforward_dim": 3 * width}
    once = {
        "train.batch_size": rows,
        "train.num_steps": steps,
        "checkpoint.every_steps": steps,
        "evaluation.every_steps": steps,
    }
    fields = {name: str(value) for name, value in (sizes | once).items()} | {"optimizer.name": optimizer}
    if parametrization == "mup":
        fields |= {"model.parametrization": "mup", "model.base_dim": str(base)}
    return RECIPE | fields


def rate_at(optimizer: str, power: float) -> float:
    """The rate of a power of √2."""
    return FIRST[optimizer] * 2 ** (power / 2)


def powers_after(swept: list[dict[int, float]]) -> set[int]:
    """The powers that a width begins with: about the best of the width before, and the first width's best."""
    if not swept:
        return set(range(-2, 3))
    before = best_of(swept[-1])
    return {before - 1, before, before + 1, best_of(swept[0])}


def rate_fields(rate: float, swept: str) -> dict[str, str]:
    """The settings of a rate of those parameters that are swept."""
    of_matrices, of_others = (rate if swept in ("all", name) else KEPT[name] for name in ("matrices", "others"))
    fields = {"optimizer.learning_rate": f"{of_matrices:.6g}"}
    if swept != "all":
        groups = {name: {"learning_rate": float(f"{of_others:.6g}")} for name in OTHERS}
        fields["optimizer.groups"] = json.dumps(groups)
    return fields


def bits_of(folder: Path, fields: dict[str, str], seed: int, swept: str, power: int) -> float:
    """Bits a byte at a power of √2, infinite of a run that diverged."""
    rate = rate_at(fields["optimizer.name"], power)
    place = Path(f"{folder}-{power:+d}-{seed}")
    try:
        return held_out_figure(train(place, fields | rate_fields(rate, swept), seed)[-1], "bits_per_byte")
    except subprocess.CalledProcessError as error:
        # A fault, such as too many outlier steps; what it was is on standard error.
        if error.returncode != 1:
            raise
        return math.inf


def sweep(bits_at: Callable[[int], float], powers: Iterable[int]) -> dict[int, float]:
    """Bits a byte by power of √2, at least those, to one on each side of the best, or as far as a sweep goes."""
    found = {power: bits_at(power) for power in sorted(powers)}
    while True:
        best = best_of(found)
        following = [power for power in (best - 1, best + 1) if power not in found and abs(power) <= FARTHEST]
        if not following:
            return found
        found |= {power: bits_at(power) for power in following}


def best_of(found: dict[int, float]) -> int:
    """The power of the fewest bits."""
    return min(found, key=lambda power: found[power])


def lowest(found: dict[int, float]) -> float:
    """The power at which the parabola through the best point and its neighbours is lowest."""
    best = best_of(found)
    if not {best - 1, best + 1} <= found.keys():
        return best
    below, at, above = (found[best + step] for step in (-1, 0, 1))
    curvature = below - 2 * at + above
    if not math.isfinite(curvature) or curvature == 0:
        return best
    return best + (below - above) / (2 * curvature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--widths", default="64,128,256,512", help="multiples of 32, the base first [64,128,256,512]")
    parser.add_argument("--optimizers", default="adamw,muon", help="[adamw,muon]")
    parser.add_argument("--steps", type=int, default=400, help="of each run [400]")
    parser.add_argument("--rows", type=int, default=16, help="of a step, of 128 tokens each [16]")
    parser.add_argument("--parametrizations", default="standard,mup", help="[standard,mup]")
    parser.add_argument("--swept", choices=("all", "matrices", "others"), default="all", help="whose rate [all]")
    parser.add_argument("--seed", type=int, default=0, help="of tokenizer, weights and order [0]")
    arguments = parser.parse_args()
    widths = [int(width) for width in arguments.widths.split(",")]
    rates: dict[str, dict[str, dict[int, float]]] = {}
    for optimizer in arguments.optimizers.split(","):
        rates[optimizer] = {}
        for parametrization in arguments.parametrizations.split(","):
            swept: list[dict[int, float]] = []
            for width in widths:
                place = f"{optimizer}-{parametrization}-{width}"
                fields = fields_of(optimizer, parametrization, width, widths[0], arguments.steps, arguments.rows)
                bits_at = partial(bits_of, arguments.to / place, fields, arguments.seed, arguments.swept)
                swept.append(sweep(bits_at, powers_after(swept)))
                shown = "  ".join(f"{power:+d}: {swept[-1][power]:.4f}" for power in sorted(swept[-1]))
                print(f"{place:22} best rate {rate_at(optimizer, lowest(swept[-1])):.2e}   {shown}", flush=True)
            rates[optimizer][parametrization] = {
                width: rate_at(optimizer, lowest(found)) for width, found in zip(widths, swept, strict=True)
            }
    spread = lambda of_widths: max(of_widths.values()) / min(of_widths.values())
    print(f"\n{'best rate':18}" + "".join(f"{width:>10}" for width in widths) + "   largest / smallest")
    for optimizer, of_parametrization in rates.items():
        for parametrization, of_widths in of_parametrization.items():
            of_each = "".join(f"{rate:10.2e}" for rate in of_widths.values())
            print(f"{optimizer + ' ' + parametrization:18}{of_each}   {spread(of_widths):.2f}")
    ratios = {optimizer: {name: spread(found) for name, found in of.items()} for optimizer, of in rates.items()}
    print(json.dumps({"best_rates": rates, "ratios": ratios, "seed": arguments.seed}))


if __name__ == "__main__":
    main()
