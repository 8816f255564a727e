"""What the default recipe is worth: AdamW and cosine beside Muon and WSD, on equal tokens of the default corpus.

    python -m tests.benchmarks.learning --to=FOLDER [--experiment=FILE]

Runs the experiment of learning.toml as `ziggurat compare` does, and prints its table: each side trains the tiny preset
with the best recipe that was found for it, once a seed. The runs are ordinary ones in FOLDER/SIDE-SEED: the same
command again goes on where it stopped. Since WSD learns much in its decay, its evaluations on the way say little of
what fewer tokens would have given; so a third side is a whole run of Muon that is as much shorter as it may be, and the
tokens for AdamW's figure are interpolated between Muon's two lengths.

Bits a byte are of held-out documents, at a run's end. The time of a step is the median of the runs' own logs. The last
line is one JSON object.
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
from train.run.step_log import read_metrics

EXPERIMENT = Path(__file__).with_suffix(".toml")
BASELINE, LONG, SHORT = "adamw", "muon", "shorter_muon"


def train(folder: Path, recipe: dict[str, str], seed: int, preset: str = "tiny") -> list[dict]:
    """Run it to its end, or find it there; the records of its metrics."""
    planned = plan_run(folder, preset, recipe | {"train.seed": str(seed), "checkpoint.export": "false"})
    if status := train_all([planned]):
        sys.exit(status)
    return read_metrics(planned.run.metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--experiment", type=Path, default=EXPERIMENT, metavar="FILE", help="with the same variants")
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.experiment)
    runs = planned_runs(experiment, arguments.to)
    if status := train_all([*runs.values()]):
        sys.exit(status)
    compared = compare_runs(experiment, arguments.to, runs)
    of = compared.figures
    # On the documents of the loop, as in every version so far; `compare` has all that are held out.
    bits = {name: [read_metrics(runs[name, seed].run.metrics)[-1]["validation_bits_per_byte"]
                   for seed in experiment.seeds] for name in of}  # fmt: skip
    tokens = {name: figures.tokens[0] for name, figures in of.items()}
    needed = [tokens_for(goal, bits, tokens, place) for place, goal in enumerate(bits[BASELINE])]
    seconds = {name: of[name].step_seconds for name in (BASELINE, LONG)}

    print(comparison_text(compared))
    others = peers(runs[BASELINE, experiment.seeds[0]].run)
    for name, value in others.items():
        print(f"{name:22}{value:10.4f}")
    share = statistics.mean(needed) / tokens[BASELINE]
    print(f"\nMuon needs {share:.0%} of the tokens for AdamW's final figure (interpolated between its two lengths)")
    ratio = share * seconds[LONG] / seconds[BASELINE]
    print(f"so it needs {ratio:.0%} of the time on this machine")
    figures = {"bits_per_byte": bits, "tokens": tokens, "tokens_needed": needed, "seconds_a_step": seconds}
    ratios = {"tokens_ratio": share, "time_ratio": ratio, "seeds": list(experiment.seeds)}
    print(json.dumps(figures | ratios | others))


def tokens_for(goal: float, bits: dict[str, list[float]], tokens: dict[str, int], place: int) -> float:
    """Tokens with which Muon comes to `goal` bits, on the line through its two runs over the logarithm of tokens."""
    long, short = bits[LONG][place], bits[SHORT][place]
    part = (goal - short) / (long - short)
    return tokens[SHORT] * (tokens[LONG] / tokens[SHORT]) ** part


if __name__ == "__main__":
    main()
