"""Held-out bits per byte of a run, beside what compresses the same documents without learning representations.

    python -m tests.benchmarks.compression RUN

gzip -9 and xz -9 work document by document. The byte 5-gram has counted all training documents of the run. The last
line is one JSON object.
"""

import json
import lzma
import math
import sys
from pathlib import Path

from train.evaluation.five_gram import five_gram_bits_per_byte
from train.evaluation.held_out import gzip_bits_per_byte
from train.prepare import open_run_mixture
from train.run.folder import HeldOutDocument, Run
from train.run.step_log import read_metrics


def peers(run: Run) -> dict[str, float]:
    """Bits a byte of the run's held-out documents by each that is no neural network."""
    config, held_out = run.load_config(), run.held_out_texts()
    texts = [text.text for text in held_out]
    size = sum(len(text.encode()) for text in texts)
    training = open_run_mixture(config, run).sources[0].corpus.training_texts(config.train.seed)
    figures = {
        "byte_5_gram": five_gram_bits_per_byte(map(HeldOutDocument, training), held_out),
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
