"""Held-out bits per byte of a run, beside what compresses the same documents without learning representations.

    python -m tests.benchmarks.compression RUN

gzip -9 and xz -9 work document by document. The byte 5-gram is fitted on the run's training documents: interpolated
Kneser-Ney smoothing with one discount an order (Kneser and Ney 1995; Chen and Goodman 1999), each document begun by
zeros and ended by one. The last line is one JSON object.
"""

import json
import lzma
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from train.evaluation.held_out import gzip_bits_per_byte
from train.prepare import open_run_mixture
from train.run.folder import Run
from train.run.step_log import read_metrics

ORDER = 5


def grams(texts: Iterable[str]) -> np.ndarray:
    """Every byte with the four before it, and every end, as one number of 40 bits."""
    parts = []
    for text in texts:
        stream = np.concatenate([np.zeros(ORDER - 1, np.int64), np.frombuffer(text.encode(), np.uint8), [0]])
        count = len(stream) - ORDER + 1
        parts.append(sum(stream[i : i + count] << (8 * (ORDER - 1 - i)) for i in range(ORDER)))
    return np.concatenate(parts)


class KneserNey:
    """Probabilities of bytes given up to ORDER - 1 before them."""

    def __init__(self, training: np.ndarray):
        self.orders = []
        seen, counts = np.unique(training, return_counts=True)
        for order in range(ORDER, 0, -1):
            once, twice = np.sum(counts == 1), np.sum(counts == 2)
            discount = once / (once + 2 * twice) if once else 0.5
            contexts, inverse = np.unique(seen >> 8, return_inverse=True)
            totals, kinds = np.bincount(inverse, counts), np.bincount(inverse)
            self.orders.append((order, discount, seen, counts, contexts, totals, kinds))
            # A shorter gram counts the different bytes that came before it.
            seen, counts = np.unique(seen & (256 ** (order - 1) - 1), return_counts=True)

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """The probability of each gram's last byte after its others."""
        probability = np.full(len(wanted), 1 / 256)
        for order, discount, seen, counts, contexts, totals, kinds in reversed(self.orders):
            gram = wanted & (256**order - 1)
            count = look_up(seen, counts, gram)
            total, kind = look_up(contexts, totals, gram >> 8), look_up(contexts, kinds, gram >> 8)
            known = np.maximum(total, 1)
            mixed = np.maximum(count - discount, 0) / known + discount * kind / known * probability
            probability = np.where(total > 0, mixed, probability)
        return probability


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values of sorted keys; 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def peers(run: Run) -> dict[str, float]:
    """Bits a byte of the run's held-out documents by each that is no neural network."""
    config, held_out = run.load_config(), run.held_out_texts()
    texts = [text.text for text in held_out]
    size = sum(len(text.encode()) for text in texts)
    model = KneserNey(grams(open_run_mixture(config, run).sources[0].corpus.training_texts(config.train.seed)))
    figures = {
        "byte_5_gram": float(-np.log2(model(grams(texts))).sum() / size),
        "gzip_9": gzip_bits_per_byte(held_out),
        "xz_9": sum(len(lzma.compress(text.encode(), preset=9)) for text in texts) * 8 / size,
    }
    assert not math.isnan(figures["byte_5_gram"])
    return figures


def main(folder: Path) -> None:
    run = Run(folder)
    held_out = run.held_out_texts()
    size = sum(len(text.text.encode()) for text in held_out)
    evaluated = [r for r in read_metrics(folder / "metrics.jsonl") if "validation_bits_per_byte" in r]
    figures = {"run": evaluated[-1]["validation_bits_per_byte"]} | peers(run)
    print(f"{len(held_out)} held-out documents, {size:,} bytes, after {evaluated[-1]['step']} steps")
    for name, bits in figures.items():
        print(f"{name:12} {bits:.3f} bits a byte   {bits / figures['gzip_9']:.2f} of gzip -9")
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
