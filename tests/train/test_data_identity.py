"""Where a run continues in data that has changed."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.mixture import initial_positions, open_mixture
from train.config.reading import make_config
from train.data_identity import RunInputs, continue_data


def test_no_stream_repeats_an_epoch_that_any_has_begun_before_a_change(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    data = {"corpus": str(path), "num_streams": 4, "accept_changes": True}
    config = make_config({"data": data, "train": {"batch_size": 4, "run_dir": str(tmp_path / "run")}}).resolved()
    tokenizer: Any = None
    inputs = RunInputs(config, open_mixture(config.data, lambda: ""), tokenizer, [], {"data.corpus": "new"})
    positions = initial_positions(inputs.mixture, 4)
    positions[:, 0, 0] = [2, 3, 3, 2]
    progress = {"identity": {"data.corpus": "old"}, "positions": positions.tolist()}
    after, again = continue_data(progress, inputs, tmp_path / "run")
    np.testing.assert_array_equal(again[:, 0, 0], 4)
    assert after.held_out
    held_out = {document.text for document in inputs.mixture.sources[0].corpus.held_out()}
    assert {text.text for text in after.held_out} == held_out
