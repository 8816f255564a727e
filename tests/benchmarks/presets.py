"""Presets that really train at a reduced batch: their loss beside the unigram entropy of the corpus.

    python -m tests.benchmarks.presets [NAME ...] [--steps=N] [--to=FOLDER]

Each preset is run as it is but for 4 rows of 256 positions a step, a tokenizer of 4,096 pieces, a warm-up of a quarter
of the steps, the default corpus, and the rate in RATES (with its own of 7e-4 and so small a batch, vaswani_base, which
is post-norm, stays at the unigram entropy). Below the unigram entropy a model has learned more than frequencies.
Interrupted, it goes on. The last line is one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from launch.cli import main as ziggurat
from train.metrics import read_steps
from train.prepare import open_run_mixture, run_tokenizer
from train.run import Run

RATES = {"vaswani_base": 2e-4}


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
    parser.add_argument("names", nargs="*", metavar="NAME", default=["vaswani_base", "gpt2_124m"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--to", type=Path, default=Path("runs/presets"))
    arguments = parser.parse_args()
    figures = {}
    for name in arguments.names:
        run, steps = Run(arguments.to / name), arguments.steps
        changes = {
            "train.run_dir": run.folder, "train.num_steps": steps, "train.batch_size": 4, "train.accumulation_steps": 1,
            "data.segment_length": 256, "tokenizer.vocab_size": 4096, "optimizer.warmup_steps": steps // 4,
            "checkpoint.every_steps": steps, "evaluation.every_steps": steps, "evaluation.max_bytes": 2**17,
        }  # fmt: skip
        if name in RATES:
            changes["optimizer.learning_rate"] = RATES[name]
        status = ziggurat(
            ["pretrain", f"--config={name}", *(f"--config.{key}={value}" for key, value in changes.items())]
        )
        assert status == 0, name
        records = [record for _, record in read_steps(run.folder / "metrics.jsonl")]
        entropy, loss = unigram_entropy(run), records[-1]["validation_loss"]
        losses = [record["loss"] for record in records]
        below = next((n for n in range(10, steps + 1) if np.mean(losses[n - 10 : n]) < entropy), math.nan)
        figures[name] = {"steps": steps, "held_out_loss": loss, "unigram_entropy": entropy, "below_from_step": below}
        print(
            f"{name:14} {steps} steps of {4 * 256:,} tokens: held-out loss {loss:.3f}, unigram entropy {entropy:.3f}; "
            f"the mean training loss of ten steps is below it from step {below}"
        )
    print(json.dumps(figures))
    assert all(found["held_out_loss"] < found["unigram_entropy"] for found in figures.values())


if __name__ == "__main__":
    main()
