"""A run whose prompts are longer than its rows: many of its steps have no token to train on."""

import json
import random

from tests.launch.small_run import here, metrics, write_config


def test_a_step_without_a_trained_token_has_no_loss_and_changes_nothing(tmp_path, capfd):
    words = ["the", "cat", "eats", "a", "dog", "sees"]
    draw = random.Random(0)
    documents = [
        {"question": " ".join(draw.choices(words, k=600)), "text": " ".join(draw.choices(words, k=20))}
        for _ in range(200)
    ]
    config = write_config(tmp_path)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    flags = ["prompt_field=question", "num_streams=1"]
    arguments = [f"--config={config}", *(f"--config.data.{flag}" for flag in flags), "--config.train.batch_size=2"]
    arguments += ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.context=8", "--config.mesh.rules={}"]
    arguments += ["--config.train.accumulation_steps=2", "--config.train.num_steps=80", "--config.checkpoint.keep=100"]
    arguments += ["--config.checkpoint.every_steps=40", "--config.evaluation.every_steps=80"]
    arguments += ["--config.evaluation.sample_tokens=0", "--config.checkpoint.export=false"]
    assert here("pretrain", *arguments) == 0
    shown = capfd.readouterr()
    assert shown.err.count("raise data.segment_length above the prompts' tokens") == 1
    records = metrics(tmp_path / "run")
    empty = [record for record in records if record["loss"] is None]
    assert len(empty) > 40
    assert all(record["loss_weight"] == 0 and record["grad_norm"] is None for record in empty)
    assert f"in {len(empty)} steps: prompts are longer than a row" in shown.out
    trained = [record["loss"] for record in records if record["loss"] is not None]
    assert trained[-1] < trained[0]
    assert '"rollback"' not in (tmp_path / "run" / "events.jsonl").read_text()
    # The rate follows the steps, not the updates.
    assert len({record["learning_rate"] for record in records}) == 80
    assert here("report", tmp_path / "run") == 0
