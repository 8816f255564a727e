"""Merged checkpoints of a run at a constant learning rate, against the same run with a decay of its own.

    python -m tests.benchmarks.merge --to=FOLDER [--seeds=0]

A trunk is trained at a constant rate. From its checkpoint at 70% of the steps a branch repeats the rest, on the same
data, with a rate that decays linearly to 0. The last checkpoints of the trunk over spans up to that 30% are averaged,
with equal weights and with those of `ziggurat merge --decay`. Bits a byte are of held-out documents. The model is the
`tiny` preset's at half its width, on the default corpus. The runs are ordinary ones in FOLDER, and go on where they
stopped. The last line is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FLAGS = [
    "--config=tiny", "--config.model.model_dim=96", "--config.data.segment_length=128", "--config.train.num_steps=600",
    "--config.evaluation.every_steps=600", "--config.evaluation.max_bytes=200_000",
    "--config.tokenizer.vocab_size=2048",
]  # fmt: skip


def ziggurat(*words: object) -> str:
    """The output of a command."""
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def bits(model: object) -> float:
    """The bits a byte of a run's held-out documents."""
    return float(json.loads(ziggurat("evaluate", model, "--json"))["bits_per_byte"])


def measure(folder: Path, flags: Sequence[str], steps: int, every: int, spans: Sequence[int]) -> dict[str, float]:
    """Bits a byte of the trunk's end, of the branch with a decay over the longest span, and of all averages."""
    trunk, branch, span = folder / "constant", folder / "decay", max(spans)
    kept = [f"--config.checkpoint.every_steps={every}", f"--config.checkpoint.keep_every_steps={every}",
            "--config.checkpoint.export=false", "--config.optimizer.schedule=wsd"]  # fmt: skip
    ziggurat("pretrain", *flags, *kept, "--config.optimizer.decay_fraction=0", f"--config.train.run_dir={trunk}")
    decay = [f"--config.optimizer.decay_fraction={span / steps}", "--config.optimizer.final_fraction=0"]
    ziggurat("pretrain", f"--config={trunk}@{steps - span}", *decay, f"--config.train.run_dir={branch}")
    found = {"constant rate": bits(f"{trunk}@{steps}"), "its own decay": bits(f"{branch}@{steps}")}
    for length in spans:
        checkpoints = [f"{trunk}@{step}" for step in range(steps - length, steps + 1, every)]
        for how, more in (("equal weights", []), ("--decay", ["--decay"])):
            merged = folder / f"merged-{length}-{how.strip('-').replace(' ', '-')}"
            shutil.rmtree(merged, ignore_errors=True)
            ziggurat("merge", *checkpoints, f"--to={merged}", *more)
            found[f"merged, {how}, last {length} steps"] = bits(merged)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--seeds", default="0", help="one trunk and branch for each [0]")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    spans = (60, 180)
    of_seeds = [
        measure(arguments.to / f"seed-{seed}", [*FLAGS, f"--config.train.seed={seed}"], 600, 20, spans)
        for seed in seeds
    ]
    print(f"{'held-out bits a byte':42}{''.join(f'  seed {seed:<3}' for seed in seeds)}   of the decay's gain")
    shares: dict[str, float] = {}
    for name in of_seeds[0]:
        found = [figures[name] for figures in of_seeds]
        gains = [(f["constant rate"] - f[name]) / (f["constant rate"] - f["its own decay"]) for f in of_seeds]
        shares[name] = statistics.mean(gains)
        print(f"{name:42}{''.join(f'{value:10.4f}' for value in found)}   {shares[name]:8.0%}")
    print(json.dumps({"bits_per_byte": of_seeds, "share_of_gain": shares, "seeds": seeds}))


if __name__ == "__main__":
    main()
