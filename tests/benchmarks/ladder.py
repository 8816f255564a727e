"""A ladder's prediction against the truth: small rungs predict a run of four times the parameters and the tokens.

    python -m tests.benchmarks.ladder --to=FOLDER [--corpus=FILE.jsonl]

The target is ladder_target.py (1.7 million parameters, 27 million tokens), unless --config names another. Its text is
--corpus, by default the documentation of ladder_texts.py, written to FOLDER/corpus.jsonl; no run reads a part of it
twice if it is as large as that. The rungs are those of `ziggurat ladder` with --scale=4.3 --longest=1: less than a
quarter of the target's size, and a quarter of its tokens. Then the target itself is trained as a rung is, a trunk with
four branches, so that there are four truths. All are ordinary runs in FOLDER: the same command again goes on where it
stopped. On one core the ladder takes 25 minutes, the target half an hour.

The errors of further held-back rungs cost no training: each rung from the fifth smallest on is predicted by all that
are smaller, at each of its lengths. The last line is one JSON object; `error_bits_per_byte` is the prediction of the
target's longest run less the truth, and `errors` are those of all its runs.
"""

import argparse
import json
import sys
from pathlib import Path

from launch.ladder_runs import (
    Ladder,
    Point,
    Result,
    check_folder,
    fit_points,
    measure,
    plan_rung,
    planned_ladder,
    read_points,
    save,
)
from launch.ladder_text import result_text
from launch.many_runs import train_all
from launch.presets import load_config
from tests.benchmarks.ladder_texts import write_text
from train.planning.budget import Budget
from train.planning.family import LEAST_STEPS, Size, make_rung, size_of
from train.planning.scaling import LEAST_SIZES

TARGET = str(Path(__file__).parent / "ladder_target.py")
SCALE = 4.3


def main() -> None:
    """Train what is not finished, and print the prediction and the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--corpus", type=Path, metavar="FILE.jsonl", help="the target's text [documentation]")
    parser.add_argument("--config", default=TARGET, metavar="NAME|FILE", help="the target [ladder_target.py]")
    parser.add_argument("--rungs", type=int, default=5, help="number of sizes [5]")
    parser.add_argument("--longest", type=float, default=1, help="tokens a parameter of rungs over the target's [1]")
    arguments = parser.parse_args()
    overrides = {}
    if arguments.corpus or arguments.config == TARGET:
        corpus = arguments.corpus or write_text("documentation", arguments.to / "corpus.jsonl")
        overrides["data.corpus"] = str(corpus.absolute())
    ladder = ladder_of(arguments, overrides)
    held_back = target_ladder(ladder, arguments.config, overrides)
    check_folder(ladder)
    save(ladder)
    # The target last, so that the prediction is there before the truth.
    if status := train_all(ladder.runs):
        sys.exit(status)
    result = measure(ladder, Budget(ladder.target_flops, None))
    print(result_text(result), flush=True)
    if status := train_all(held_back.runs):
        sys.exit(status)
    print(json.dumps(figures(result, read_points(held_back))))


def ladder_of(arguments: argparse.Namespace, overrides: dict[str, str]) -> Ladder:
    """The plan of the rungs."""
    config = arguments.config
    flags = {"rungs": float(arguments.rungs), "scale": SCALE, "longest": arguments.longest}
    flags |= {"least_rows": 1.0, "least_steps": float(LEAST_STEPS)}
    return planned_ladder(config, overrides, load_config(config, overrides), arguments.to, flags)


def target_ladder(ladder: Ladder, config: str, overrides: dict[str, str]) -> Ladder:
    """The target's own runs, as those of a ladder with one rung: its last branch is the config's run."""
    target, rows = ladder.target, ladder.target.train.batch_size
    streams = ladder.rungs[0].fields["data.num_streams"]
    rung = make_rung(target, Size(target.model, size_of(target), 0.0), 1.0, rows, streams, least_steps=1)
    trunk, branches = plan_rung(ladder.folder, "target", rung, config, overrides, target)
    return Ladder(ladder.folder, target, {}, [rung], [trunk], [branches])


def figures(result: Result, truth: list[Point]) -> dict:
    """The predictions against the truth, and the errors of held-back rungs."""
    errors = [{"tokens": point.D, "truth": point.bits, "predicted": (value := result.fit.predict(point.N, point.D)),
               "holds": value.low <= point.bits <= value.high, "error": value.value - point.bits}
              for point in truth]  # fmt: skip
    return {
        "errors": errors, "held_back": held_back_errors(result.points), "error_bits_per_byte": errors[-1]["error"],
    }  # fmt: skip


def held_back_errors(points: list[Point]) -> list[dict]:
    """For each rung with enough smaller ones: their prediction less its loss, at each of its lengths."""
    sizes = sorted({point.N for point in points})
    errors = []
    for number, N in enumerate(sizes):
        if number < LEAST_SIZES:
            continue
        law = fit_points([point for point in points if N > point.N], resamples=0).law
        of_rung = [law.loss(point.N, point.D) - point.bits for point in points if N == point.N]
        errors.append({"N": N, "times_the_largest_below": N / sizes[number - 1], "errors": of_rung})
    return errors


if __name__ == "__main__":
    main()
