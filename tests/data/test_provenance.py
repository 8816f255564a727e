"""The summary of a corpus, from a sample of it. (`inspect data` is tested with a run.)"""

import dataclasses
import json
from pathlib import Path

import pytest

from data.config import DataConfig
from data.mixture import open_mixture
from data.provenance import summarize
from tests.data.stand_in import ByteTokenizer

CONFIG = DataConfig(segment_length=32, num_streams=2, validation_fraction=0.0, segmentation="pack")


def test_a_summary_counts_the_epochs_of_rows_that_are_partly_empty(tmp_path: Path):
    """Each row holds one document of 20 tokens and its end, and 11 positions without any."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 20}) + "\n" for _ in range(300)))
    config = dataclasses.replace(CONFIG, corpus=str(path))
    [summary] = summarize(open_mixture(config, lambda: ""), ByteTokenizer(), 0, [(0, 6, 100 * 32)])
    assert (summary["documents"], summary["tokens"]) == (300, 300 * 21)
    assert summary["utilization"] == pytest.approx(21 / 32)
    assert summary["epochs"] == pytest.approx(2)
