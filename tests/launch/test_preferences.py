"""A run on pairs of answers: its figures and reference, that it resumes exactly, what is refused (C4, C8, C9)."""

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.launch.small_run import back_to, command, here, metrics, write_config
from tests.launch.test_pretrain import assert_same_end, state_of, without_times
from train.run.folder import Run

STEPS = 8
FLAGS = [
    "--config.data.segmentation=pack", "--config.data.segment_length=64", f"--config.train.num_steps={STEPS}",
    "--config.data.text_field=good", "--config.data.prompt_field=ask", "--config.data.rejected_field=bad",
    "--config.objective.name=dpo", "--config.train.init_with=weights", "--config.checkpoint.every_steps=3",
    "--config.checkpoint.keep=3", "--config.checkpoint.export=false",
    "--config.evaluation.sample_tokens=0", "--config.optimizer.learning_rate=1e-3",
]  # fmt: skip


def write_pairs(file: Path) -> Path:
    """Pairs in which the chosen answer names the animal of the question."""
    animals = ["cat", "dog", "bird", "fish"]
    records = [
        {"ask": f"who is {animals[i % 4]} {i}?", "good": f"my {animals[i % 4]}.", "bad": f"a {animals[(i + 1) % 4]}."}
        for i in range(300)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def flags_of(folder: Path, parent: Path, run: str = "run") -> list[str]:
    pairs = folder / "pairs.jsonl"
    config = write_config(folder, run)
    corpus = f"--config.data.corpus={pairs if pairs.exists() else write_pairs(pairs)}"
    return [f"--config={config}", corpus, f"--config.train.init_from={parent}@12", *FLAGS]


@pytest.fixture(scope="module")
def preferred(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that began from a run that is gone."""
    folder = tmp_path_factory.mktemp("preferred")
    parent = folder / "parent"
    shutil.copytree(finished, parent)
    assert here("pretrain", *flags_of(folder, parent)) == 0
    parent.rename(folder / "gone")
    return folder / "run"


def test_a_run_begins_at_its_reference_keeps_it_and_learns_what_is_preferred(preferred: Path, finished: Path):
    records = metrics(preferred)
    assert records[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert [records[0][name] for name in ("accuracy", "margin", "chosen_reward", "kl")] == [0, 0, 0, 0]
    assert records[-1]["accuracy"] > 0.6
    assert records[-1]["loss"] < math.log(2)
    for record in records:
        assert record["margin"] == pytest.approx(record["chosen_reward"] - record["rejected_reward"], abs=1e-5)
        # Some six tokens with a prompt, and some three answers in a row.
        assert 0.1 < record["utilization"] == record["answer_tokens"] / (8 * 64) < 0.7
        assert 8 <= record["loss_weight"] < record["answer_tokens"] / 4
    evaluated = [record for record in records if "validation_preference_loss" in record]
    assert [record["step"] for record in evaluated] == [1, 6, STEPS]
    assert evaluated[-1]["validation_preference_loss"] < evaluated[0]["validation_preference_loss"] < 0.7
    assert evaluated[-1]["validation_preference_accuracy"] > 0.6
    assert evaluated[-1]["held_out_pairs"] == len([d for d in Run(preferred).held_out_texts() if d.rejected]) > 10
    assert evaluated[-1]["held_out_margin"] > 0
    assert all(record["validation_bits_per_byte"] > 0 for record in evaluated)
    state, _ = state_of(preferred, STEPS)
    begun, _ = state_of(finished, 12)
    jax.tree.map(np.testing.assert_array_equal, state["reference"], begun["weights"])


def test_it_resumes_exactly_though_the_run_that_it_began_from_is_gone(preferred: Path, tmp_path: Path, capsys):
    again = back_to(3, preferred, tmp_path / "again")
    assert here("pretrain", f"--config={again}") == 0
    assert re.search(r"loss 0\.\d{4}  accuracy \d+\.\d%  margin 0\.\d{3}", capsys.readouterr().err)
    assert_same_end(again, preferred, STEPS)
    assert without_times(metrics(again)) == without_times(metrics(preferred))
    assert here("pretrain", f"--config={again}", "--config.objective.beta=0.3") == 2
    assert "objective.beta" in capsys.readouterr().err


def test_killed_at_any_instant_it_ends_with_the_same_bits(preferred: Path, finished: Path, tmp_path: Path):
    flags = flags_of(tmp_path, finished)
    process = command("pretrain", *flags, devices=8, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    # After the first save has begun, which may be complete or not.
    last = random.randrange(4, STEPS)
    for line in process.stderr:
        if re.match(rf"step {last}/", line):
            break
    process.kill()
    process.wait()
    assert here("pretrain", *flags) == 0
    (state, _), (expected, _) = state_of(tmp_path / "run", STEPS), state_of(preferred, STEPS)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_report_charts_the_accuracy(preferred: Path, tmp_path: Path):
    assert here("report", preferred, f"--output={tmp_path / 'report.html'}") == 0
    page = (tmp_path / "report.html").read_text()
    for words in ("nats a pair", "Accuracy", "Margin", "Held-out accuracy"):
        assert words in page


def test_a_batch_shows_both_answers(preferred: Path, capsys):
    capsys.readouterr()
    assert here("inspect", "data", preferred, "--step=2", "--json") == 0
    parts = [part for row in json.loads(capsys.readouterr().out)["rows"] for part in row["parts"]]
    assert len(parts) == 2 * metrics(preferred)[1]["loss_weight"]
    assert here("inspect", "data", preferred, "--step=2", "--row=0") == 0
    assert re.search(r"pairs.jsonl, byte \d+, rejected answer, characters 0 to \d+", capsys.readouterr().out)


def test_what_a_user_gets_wrong_is_said_before_anything_runs(finished: Path, tmp_path: Path, capsys):
    start = ["pretrain", *flags_of(tmp_path, finished)]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"ask": "q", "good": "a", "bad": "b"}\n{"ask": "q", "good": "a", "bad": "a"}\n')
    long = tmp_path / "long.jsonl"
    pairs = [{"ask": "q", "good": "a", "bad": "b" * (i == 4) * 400 + "b"} for i in range(60)]
    long.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for flags, words in (
        (["--config.train.init_from=none", "--config.train.init_with=all"],
         ["objective.name = dpo compares with the weights that the run begins with"]),
        (["--config.data.rejected_field=none", "--config.model.z_loss=1e-4", "--config.model.label_smoothing=0.1"],
         ["name the field of the rejected one with data.rejected_field", "model.z_loss has no effect",
          "model.label_smoothing has no effect with objective.name = dpo"]),
        (["--config.objective.name=next_token"], ["objective.name = next_token compares no answers"]),
        (["--config.objective.name=simpo", "--config.objective.length_normalized=true"],
         ["objective.length_normalized has no effect with objective.name = simpo; leave it at False"]),
        (["--config.objective.gamma=2"], ["objective.gamma has no effect with objective.name = dpo; leave it at 1.0"]),
        (["--config.objective.name=ppo", "--config.objective.label_smoothing=0.5", "--config.objective.beta=0"],
         ["it must be one of next_token, dpo, simpo", "it must be in [0, 0.5)", "objective.beta is 0.0"]),
        (["--config.data.segmentation=concatenate"], ["with data.rejected_field it must be pack"]),
        ([f"--config.data.corpus={bad}"], [f"{bad}:2: fields 'good' and 'bad' are the same"]),
        ([f"--config.data.corpus={long}", "--config.data.segment_length=32"], [f"{long}:5: the pair takes"]),
    ):  # fmt: skip
        capsys.readouterr()
        assert here(*start, *flags) == 2, flags
        err = capsys.readouterr().err
        for word in words:
            assert word in err
        assert "Traceback" not in err
        assert not (tmp_path / "run" / "checkpoints").exists()
