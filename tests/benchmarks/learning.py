"""What the default recipe is worth: AdamW and cosine next to it, on equal tokens of the default corpus.

    python -m tests.benchmarks.learning --to=FOLDER [--sizes=tiny,medium,large]

Runs the experiments of learning.toml (the preset `tiny`), learning_medium.toml (four layers of 256) and
learning_large.toml (six of 320, half of the steps) as `ziggurat compare` does, and prints their tables: each side with
the best rate that was found for it, once a seed. The runs are ordinary ones in FOLDER/SIZE/SIDE-SEED: the same command
again goes on where it stopped. Since WSD learns much in its decay, its evaluations on the way say little of what fewer
tokens would have given; so one side is a whole run of the recipe with 44% of the tokens, and the tokens for AdamW's
figure are interpolated between the recipe's two lengths.

AdamW is there twice: without `data.shuffle_rows`, and on the very rows of the recipe, where all that differs is the
optimizer. Bits a byte are of all held-out documents, at a run's end. The time of a step is the median of the runs' own
logs. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from launch.compare_runs import compare_runs, planned_runs
from launch.compare_text import comparison_text
from launch.experiment import read_experiment
from launch.many_runs import plan_run, train_all
from tests.benchmarks.compression import peers
from train.run.comparison import Figures
from train.run.step_log import read_metrics

FOLDER = Path(__file__).parent
EXPERIMENTS = {
    "tiny": FOLDER / "learning.toml",
    "medium": FOLDER / "learning_medium.toml",
    "large": FOLDER / "learning_large.toml",
}
BASELINES, LONG, SHORT = ("adamw", "adamw_shuffled"), "recipe", "shorter_recipe"


def train(folder: Path, recipe: dict[str, str], seed: int, preset: str = "tiny") -> list[dict]:
    """Run it to its end, or find it there; the records of its metrics."""
    planned = plan_run(folder, preset, recipe | {"train.seed": str(seed), "checkpoint.export": "false"})
    if status := train_all([planned]):
        sys.exit(status)
    return read_metrics(planned.run.metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--sizes", default=",".join(EXPERIMENTS), help="which of them, with commas between")
    arguments = parser.parse_args()
    results = {size: compare(EXPERIMENTS[size], arguments.to / size) for size in arguments.sizes.split(",")}
    worst = {name: max(of[name] for of in results.values()) for name in ("tokens_ratio", "time_ratio")}
    seeds = min(len(of["bits_per_byte"][LONG]) for of in results.values())
    print(json.dumps(results | worst | {"seeds": seeds}))


def compare(experiment_file: Path, folder: Path) -> dict:
    """Train the sides of one size, and print what they reached; the figures of its part of the JSON line."""
    experiment = read_experiment(experiment_file)
    runs = planned_runs(experiment, folder)
    if status := train_all([*runs.values()]):
        sys.exit(status)
    compared = compare_runs(experiment, folder, runs)
    print(comparison_text(compared))
    of = compared.figures
    others = peers(runs[BASELINES[0], experiment.seeds[0]].run)
    for name, value in others.items():
        print(f"{name:22}{value:10.4f}")
    ratios = {name: ratios_to(of, name) for name in BASELINES}
    for name, (tokens, time, is_bound) in ratios.items():
        most = "at most " if is_bound else ""
        print(f"for the end of {name} the recipe needs {most}{tokens:.0%} of the tokens, {most}{time:.0%} of the time")
    print()
    figures = {name: {"tokens_ratio": tokens, "time_ratio": time} for name, (tokens, time, _) in ratios.items()}
    tokens, time, _ = ratios[BASELINES[0]]
    bits = {name: list(side.bits) for name, side in of.items()}
    return {"bits_per_byte": bits, "next_to": figures, "tokens_ratio": tokens, "time_ratio": time} | others


def ratios_to(of: dict[str, Figures], baseline: str) -> tuple[float, float, bool]:
    """Shares of a baseline's tokens and time in which the recipe comes to its figure, and whether they are bounds."""
    bits = {name: of[name].bits for name in (LONG, SHORT)}
    tokens = {name: of[name].tokens[0] for name in (LONG, SHORT)}
    goals = of[baseline].bits
    shares = [tokens_for(goal, bits, tokens, place) / of[baseline].tokens[0] for place, goal in enumerate(goals)]
    share = statistics.mean(shares)
    is_bound = any(goal >= bits[SHORT][place] for place, goal in enumerate(goals))
    return share, share * of[LONG].step_seconds / of[baseline].step_seconds, is_bound


def tokens_for(goal: float, bits: dict[str, list[float]], tokens: dict[str, int], place: int) -> float:
    """Tokens with which the recipe comes to `goal` bits, on the line through its two runs over the logarithm of tokens.

    Where the shorter run is already as good they are its own, since the line is not known below.
    """
    long, short = bits[LONG][place], bits[SHORT][place]
    part = max((goal - short) / (long - short), 0.0)
    return tokens[SHORT] * (tokens[LONG] / tokens[SHORT]) ** part


if __name__ == "__main__":
    main()
