"""What the optimizer is worth: AdamW and cosine beside Muon and WSD, on equal tokens of the default corpus.

    python -m tests.benchmarks.learning --to=FOLDER [--seeds=0,1,2]

Each side trains the tiny preset with the best recipe that was found for it, once a seed; a seed gives all sides the
same initial weights and the same data in the same order. The runs are ordinary ones in FOLDER/SIDE-SEED: the same
command again goes on where it stopped. Since WSD learns much in its decay, its evaluations on the way say little of
what fewer tokens would have given; so a third side is a whole run of Muon that is as much shorter as it may be.

Bits a byte are of held-out documents, at a run's end. The time of a step is measured at the end, the sides taking
turns in one process. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from launch.presets import load_config
from tests.benchmarks.compression import peers
from train.config.config import Config
from train.devices.mesh import batch_sharding, make_mesh
from train.run.folder import Run
from train.run.step_log import read_metrics
from train.step.optimizer import make_optimizer
from train.step.state import make_state
from train.step.step import make_train_step

# Changes to the preset, whose recipe is Muon's.
RECIPES: dict[str, dict[str, str]] = {
    "adamw": {
        "optimizer.name": "adamw",
        "optimizer.learning_rate": "4e-3",
        "optimizer.warmup_steps": "none",
        "optimizer.muon_momentum": "0.95",
        "optimizer.beta2": "0.95",
        "optimizer.weight_decay": "0.1",
        "optimizer.schedule": "cosine",
        "optimizer.decay_fraction": "0.2",
        "optimizer.final_fraction": "0.1",
    },
    "muon": {},
    "shorter muon": {"train.num_steps": "540"},
}
ROUNDS, STEPS = 7, 5


def train(folder: Path, recipe: dict[str, str], seed: int, preset: str = "tiny") -> list[dict]:
    """Run it to its end, or find it there; the records of its metrics."""
    fields = recipe | {"train.run_dir": str(folder), "train.seed": str(seed), "checkpoint.export": "false"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "launch.cli", "pretrain", f"--config={preset}", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "metrics.jsonl")


def steps_of(config: Config) -> Callable[[], float]:
    """A function that trains STEPS steps on random tokens and returns the seconds of one."""
    mesh, (B, T) = make_mesh(config), (config.train.batch_size, config.data.segment_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T), dtype=np.int32)
    places = {"positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)), "segment_ids": np.ones((B, T), np.int32)}
    batch = places | {"tokens": tokens, "targets": tokens, "loss_weights": np.ones((B, T), np.float32)}
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)

    def seconds() -> float:
        nonlocal state
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in range(STEPS):
                state, _ = step(state, jax.device_put(batch, batch_sharding(mesh)))
            jax.block_until_ready(state)
        return (time.perf_counter() - start) / STEPS

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the runs are, or will be")
    parser.add_argument("--seeds", default="0,1,2", help="one run of each side for each [0,1,2]")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    configs = {side: load_config("tiny", recipe) for side, recipe in RECIPES.items()}
    folders = {(side, seed): arguments.to / f"{side.replace(' ', '_')}-{seed}" for seed in seeds for side in RECIPES}
    records = {place: train(folder, RECIPES[place[0]], place[1]) for place, folder in folders.items()}
    bits = {side: [records[side, seed][-1]["validation_bits_per_byte"] for seed in seeds] for side in RECIPES}
    tokens = {side: c.train.num_steps * c.train.batch_size * c.data.segment_length for side, c in configs.items()}
    needed = [tokens_for(goal, bits, tokens, place) for place, goal in enumerate(bits["adamw"])]

    timed = {side: steps_of(configs[side].resolved(4096)) for side in ("adamw", "muon")}
    rounds = [{side: seconds() for side, seconds in timed.items()} for _ in range(1 + ROUNDS)]
    # The first round compiles.
    step_seconds = {side: statistics.median(times[side] for times in rounds[1:]) for side in timed}

    print(
        f"{'held-out bits a byte':22}{''.join(f'  seed {seed:<3}' for seed in seeds)}     mean ± deviation     tokens"
    )
    for side, found in bits.items():
        spread = statistics.stdev(found) if len(found) > 1 else math.nan
        of_each = "".join(f"{value:10.4f}" for value in found)
        print(f"{side:22}{of_each}   {statistics.mean(found):.4f} ± {spread:.4f}  {tokens[side]:10,}")
    others = peers(Run(folders["adamw", seeds[0]]))
    for name, value in others.items():
        print(f"{name:22}{value:10.4f}")
    share = statistics.mean(needed) / tokens["adamw"]
    print(f"\nMuon needs {share:.0%} of the tokens for AdamW's final figure (interpolated between its two lengths)")
    for side, seconds in step_seconds.items():
        print(f"{side:22}{seconds:10.4f} s a step")
    ratio = share * step_seconds["muon"] / step_seconds["adamw"]
    print(f"so it needs {ratio:.0%} of the time on this machine")
    figures = {"bits_per_byte": bits, "tokens": tokens, "tokens_needed": needed, "seconds_a_step": step_seconds}
    print(json.dumps(figures | others))


def tokens_for(goal: float, bits: dict[str, list[float]], tokens: dict[str, int], place: int) -> float:
    """Tokens with which Muon comes to `goal` bits, on the line through its two runs over the logarithm of tokens."""
    long, short = bits["muon"][place], bits["shorter muon"][place]
    part = (goal - short) / (long - short)
    return tokens["shorter muon"] * (tokens["muon"] / tokens["shorter muon"]) ** part


if __name__ == "__main__":
    main()
