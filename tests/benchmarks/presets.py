"""Presets that really train at a reduced batch: their loss beside the unigram entropy of the corpus.

    python -m tests.benchmarks.presets [NAME ...] [--to=FOLDER]

Each preset is run as it is but for its `SETTINGS`, on the default corpus. vaswani_base is post-norm: with so small a
batch it had learned nothing but frequencies after 300 steps at its own rate of 7e-4, nor after 330 at 2e-4 (vocabulary
4,096) or 200 at 4e-4 (512); at 1e-4 it learns more. Below the unigram entropy a model knows more than frequencies.
Interrupted, it goes on. The last line is one JSON object.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from launch.cli import main as ziggurat
from train.prepare import open_run_mixture, run_tokenizer
from train.run.folder import Run
from train.run.step_log import read_metrics

SETTINGS: dict[str, dict[str, Any]] = {
    "vaswani_base": {
        "train.num_steps": 300, "train.batch_size": 16, "data.segment_length": 64, "tokenizer.vocab_size": 512,
        "optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 150, "model.compute_dtype": "float32",
    },
    "gpt2_124m": {
        "train.num_steps": 300, "train.batch_size": 4, "data.segment_length": 256, "tokenizer.vocab_size": 4096,
        "optimizer.warmup_steps": 75,
    },
}  # fmt: skip
# Steps whose training losses are averaged.
WINDOW = 20


def unigram_entropy(run: Run) -> float:
    """Nats a token of the training documents, ends included, for who knows the tokens' frequencies alone."""
    config = run.load_config()
    mixture = open_run_mixture(config, run)
    tokenizer = run_tokenizer(config, run, mixture)
    counts = np.zeros(tokenizer.vocab_size)
    for text in mixture.sources[0].corpus.training_texts(config.train.seed):
        counts += np.bincount(tokenizer.encode(text), minlength=len(counts))
        counts[tokenizer.eos_id] += 1
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*SETTINGS])
    parser.add_argument("--to", type=Path, default=Path("runs/presets"))
    arguments = parser.parse_args()
    figures = {}
    for name in arguments.names:
        run, settings = Run(arguments.to / name), SETTINGS[name]
        steps, tokens = settings["train.num_steps"], settings["train.batch_size"] * settings["data.segment_length"]
        changes = settings | {
            "train.run_dir": run.folder, "train.accumulation_steps": 1, "checkpoint.every_steps": steps,
            "evaluation.every_steps": steps, "evaluation.max_bytes": 2**17,
        }  # fmt: skip
        status = ziggurat(
            ["pretrain", f"--config={name}", *(f"--config.{key}={value}" for key, value in changes.items())]
        )
        assert status == 0, name
        records = read_metrics(run.metrics)
        entropy, loss = unigram_entropy(run), records[-1]["validation_loss"]
        losses = [record["loss"] for record in records]
        below = next((n for n in range(WINDOW, steps + 1) if np.mean(losses[n - WINDOW : n]) < entropy), math.nan)
        figures[name] = {"steps": steps, "held_out_loss": loss, "unigram_entropy": entropy, "below_from_step": below}
        print(
            f"{name:14} {steps} steps of {tokens:,} tokens: held-out loss {loss:.3f}, unigram entropy {entropy:.3f}; "
            f"the mean training loss of {WINDOW} steps is below it from step {below}"
        )
    print(json.dumps(figures))
    assert all(found["held_out_loss"] < found["unigram_entropy"] for found in figures.values())


if __name__ == "__main__":
    main()
