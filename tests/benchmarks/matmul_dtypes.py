"""Losses with 8-bit products beside those in bfloat16, on the same data from the same initial weights.

    python -m tests.benchmarks.matmul_dtypes --to=FOLDER [--seeds=0] [--steps=300]

Each side trains the tiny preset for fewer steps, as an ordinary run in FOLDER/SIDE-SEED: the same command again goes on
where it stopped. A CPU has no products of 8 bits and emulates them, so times say nothing. Losses are means of the 20
steps up to the one that is named, in nats a token; bits a byte are of held-out documents at the end. The last line is
one JSON object.
"""

import argparse
import json
import statistics
from pathlib import Path

from tests.benchmarks.learning import train

SIDES = {"bfloat16": "none", "float8": "float8", "int8": "int8"}
MEAN_OF = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--seeds", default="0", help="one run of each side for each [0]")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run [300]")
    arguments = parser.parse_args()
    seeds, steps = arguments.seeds.split(","), arguments.steps
    at = [steps // 4, steps // 2, steps]
    print(f"{'side':12}{'seed':>6}" + "".join(f"{f'loss, {step}':>12}" for step in at) + f"{'bits a byte':>14}")
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        for side, dtype in SIDES.items():
            recipe = {"train.num_steps": str(steps), "model.matmul_dtype": dtype}
            records = train(arguments.to / f"{side}-{seed}", recipe, int(seed))
            found = [mean_loss(records, step) for step in at] + [records[-1]["validation_bits_per_byte"]]
            figures.setdefault(side, {})[seed] = found
            print(f"{side:12}{seed:>6}" + "".join(f"{loss:12.4f}" for loss in found[:-1]) + f"{found[-1]:14.4f}")
    for side in list(SIDES)[1:]:
        above = [figures[side][seed][-1] / figures["bfloat16"][seed][-1] - 1 for seed in seeds]
        print(f"{side}: {statistics.mean(above):+.2%} bits a byte next to bfloat16")
    print(json.dumps(figures))


def mean_loss(records: list[dict], step: int) -> float:
    """The mean loss of the steps up to this one."""
    return statistics.mean(record["loss"] for record in records if step - MEAN_OF < record["step"] <= step)


if __name__ == "__main__":
    main()
