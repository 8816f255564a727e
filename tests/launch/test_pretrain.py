"""A run from its start to its end: its files, its output, and that it resumes exactly (C4, C8)."""

import gzip
import json
import logging
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import train.loop
from data.tokenizer.folder import load_tokenizer
from tests.launch.small_run import TRAINING_ALONE, back_to, command, here, metrics, write_config
from train.checkpoint.checkpoint import Checkpoints
from train.devices.mesh import one_device_mesh
from train.run.folder import Run
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state
from train.step.step import StepPrograms
from train.weights.huggingface import exported_step

# For tests in which neither a sample nor an export has a part.
NO_TEXT = ("--config.evaluation.sample_tokens=0", "--config.checkpoint.export=false")


def state_of(run: Path, step: int):
    """Everything in the newest checkpoint, which is of this step, and its progress."""
    config = Run(run).load_config()
    with jax.set_mesh(one_device_mesh()):
        checkpoints = Checkpoints(run / "checkpoints")
        assert checkpoints.steps()[-1] == step
        found = checkpoints.restore(abstract_state(config, make_optimizer(config)))
        checkpoints.close()
    assert found is not None
    return jax.device_get(found)


def assert_same_end(run: Path, other: Path, step: int) -> None:
    """Bit-identical weights, optimizer state and data position."""
    (state, progress), (other_state, other_progress) = state_of(run, step), state_of(other, step)
    for one, another in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_array_equal(one, another)
    assert progress == other_progress


def without_times(records: list[dict]) -> list[dict]:
    of_the_machine = ("time", "tokens_per_second", "peak_share", "data_wait_seconds", "memory_bytes")
    return [{k: v for k, v in r.items() if k not in of_the_machine} for r in records]


def test_a_run_leaves_its_config_tokenizer_checkpoints_metrics_and_weights(finished: Path):
    names = {path.name for path in finished.iterdir()}
    logs = {"metrics.jsonl", "positions.jsonl", "events.jsonl"}
    assert names == {"config.json", "tokenizer", "checkpoints", "held_out.jsonl", "export"} | logs
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"8", "12"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (finished / "export").iterdir()
    }
    records = metrics(finished)
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait_seconds"} <= record.keys()
        assert record["memory_bytes"] > 2**20
        assert 0 < record["peak_share"] < 1
        assert record["utilization"] == 1
        assert record["loss_weight"] == 8 * 32
        evaluated = record["step"] in (1, 6, 12)
        assert evaluated == ({"validation_loss", "validation_bits_per_byte", "sample"} <= record.keys())
    assert records[-1]["loss"] < records[0]["loss"] - 1
    assert records[-1]["validation_bits_per_byte"] < records[0]["validation_bits_per_byte"] - 1
    # The curve is of one text throughout, and the whole set is a figure of its own.
    assert len({record["validation_tokens"] for record in records if "validation_tokens" in record}) == 1
    assert [record["step"] for record in records if "held_out_bits_per_byte" in record] == [12]
    assert records[-1]["held_out_tokens"] > records[-1]["validation_tokens"]
    saved = json.loads((finished / "config.json").read_text())
    assert saved["model"]["vocab_size"] == load_tokenizer(finished / "tokenizer").vocab_size
    assert saved["model"]["head_dim"] == 8


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(finished: Path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if "config.json" not in path.name}
    assert here("pretrain", f"--config={finished.parent / 'run.py'}") == 0
    out = capsys.readouterr().out
    for words in ("is finished", "gzip -9 needs", "goodput  ", "what it learned", "ziggurat generate", "sample:"):
        assert words in out
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if "config.json" not in path.name}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_killed_inside_a_save_it_ends_with_the_same_bits(tmp_path: Path, capsys):
    shared = ["--config.checkpoint.every_steps=3", "--config.train.num_steps=20", *TRAINING_ALONE]
    straight, killed = write_config(tmp_path, "straight"), write_config(tmp_path, "killed")
    assert here("pretrain", f"--config={straight}", *shared) == 0
    folder = tmp_path / "killed"
    process = command("pretrain", f"--config={killed}", *shared, devices=8,
                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 8/"):  # the save of step 6 has begun, so that of step 3 is whole
            break
    deadline = time.monotonic() + 30
    while not any("tmp" in path.name for path in (folder / "checkpoints").iterdir()):
        if process.poll() is not None:
            break
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0)
    complete = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    # A save is written during the next steps, and the next save, whose step is logged before, waits for it.
    assert metrics(folder)[-1]["step"] - max(complete) <= 2 * 3
    capsys.readouterr()
    assert here("pretrain", f"--config={killed}", *shared) == 0
    assert f"resumes at step {max(complete)}" in capsys.readouterr().err
    assert_same_end(folder, tmp_path / "straight", 20)
    assert without_times(metrics(folder)) == without_times(metrics(tmp_path / "straight"))


def test_a_run_may_go_on_elsewhere_and_longer(finished: Path, tmp_path: Path, capsys, caplog):
    shutil.copytree(finished, tmp_path / "run")
    config = finished.parent / "run.py"
    moved = [f"--config.train.run_dir={tmp_path / 'run'}", "--config.mesh.tensor=2", *NO_TEXT]
    assert here("pretrain", f"--config={config}", *moved, "--config.train.num_steps=14") == 0
    assert "changed on resume:\n  field            before  now\n  train.num_steps  12      14\n" in caplog.text
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 15))


def test_a_run_of_an_older_version_goes_on_although_its_config_lacks_fields_that_came_since(tmp_path: Path):
    train = ["pretrain", f"--config={write_config(tmp_path)}", *TRAINING_ALONE]
    assert here(*train, "--config.train.num_steps=4") == 0
    file = tmp_path / "run" / "config.json"
    settings = json.loads(file.read_text())
    for name in ("rope_dim", "value_dim", "attention_output_bias", "layer_pattern"):
        del settings["model"][name]
    file.write_text(json.dumps(settings))
    assert here(*train, "--config.train.num_steps=5") == 0
    assert json.loads(file.read_text())["model"]["rope_dim"] == 8
    fork = [f"--config.train.init_from={tmp_path / 'run'}@4", f"--config.train.run_dir={tmp_path / 'fork'}"]
    assert here(*train, *fork, "--config.train.num_steps=6") == 0


def test_a_batch_ramp_resumes_exactly_and_an_average_is_what_is_evaluated_and_exported(tmp_path: Path, capsys):
    config, run = write_config(tmp_path), tmp_path / "run"
    ramp = ["--config.train.batch_size=16", "--config.train.batch_ramp_start=8", "--config.train.batch_ramp_steps=10"]
    flags = ["pretrain", f"--config={config}", "--config.train.ema_decay=0.8", *ramp]
    assert here(*flags, "--config.train.accumulation_steps=2") == 0
    err = capsys.readouterr().err
    assert "512 tokens each, the first 10 steps on a ramp from 256" in err
    assert "evaluated and exported: the moving average of the weights, decay 0.8" in err
    assert [record["loss_weight"] for record in metrics(run)] == [256] * 10 + [512] * 2
    copy = back_to(8, run, tmp_path / "copy")
    assert here(*flags, "--config.train.accumulation_steps=2", f"--config.train.run_dir={copy}") == 0
    assert_same_end(copy, run, 12)
    assert without_times(metrics(copy)) == without_times(metrics(run))
    exported = load_file(run / "export" / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(exported, state_of(run, 12)[0]["average"]["norm"]["scale"])
    capsys.readouterr()
    assert here("evaluate", run, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(metrics(run)[-1]["held_out_loss"], rel=1e-5)
    assert here(*flags, "--config.train.batch_ramp_steps=8") == 2
    assert "train.batch_ramp_steps  10      8\n" in capsys.readouterr().err


def test_a_run_is_watched_and_traced_and_trains_as_it_would_have(finished: Path, tmp_path: Path, capsys, caplog):
    config, run = write_config(tmp_path), tmp_path / "run"
    flags = ["--config.train.watch_every_steps=4", "--config.train.profile_steps=3,5"]
    assert here("pretrain", f"--config={config}", *flags) == 0
    err = capsys.readouterr().err
    records, expected = metrics(run), metrics(finished)
    assert [record["step"] for record in records if "watch" in record] == [4, 8, 12]
    for record, other in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    watched = records[3]["watch"]
    assert len(watched["largest_logit"]) == len(watched["grad_norm"]["blocks.attention.query"]) == 2
    assert f"step 8  largest logit {max(records[7]['watch']['largest_logit']):.1f} (layer " in err

    assert f"trace of steps 3 to 5, and their program: {run / 'profile'}" in err
    assert "HloModule jit_train_step" in (run / "profile" / "train_step.txt").read_text()
    (trace,) = (run / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert steps == {"3", "4", "5"}
    assert list((run / "profile").rglob("*.xplane.pb"))

    # A run that resumes behind the steps to be traced warns and traces nothing.
    shutil.rmtree(run / "profile")
    assert here("pretrain", f"--config={config}", "--config.train.profile_steps=(9,11)",
                "--config.train.num_steps=13", *NO_TEXT) == 0  # fmt: skip
    assert "train.profile_steps = (9, 11): the run has done 12 steps, so nothing is traced" in caplog.text
    assert not (run / "profile").exists()


def test_the_first_step_is_compiled_once_while_the_tokenizer_is_trained(tmp_path: Path, monkeypatch, caplog):
    compile_ahead, had_tokenizer = StepPrograms.compile_ahead, []

    def noted(*arguments: object) -> None:
        had_tokenizer.append((tmp_path / "run" / "tokenizer").exists())
        compile_ahead(*arguments)

    monkeypatch.setattr(StepPrograms, "compile_ahead", noted)
    monkeypatch.setattr(train.loop, "MUCH_TEXT", 2**16)
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    # A vocabulary that this small corpus supports.
    flags = ["--config.tokenizer.vocab_size=320", "--config.train.num_steps=1", *TRAINING_ALONE]
    assert here("pretrain", f"--config={write_config(tmp_path)}", *flags) == 0
    assert had_tokenizer[0] is False
    assert caplog.text.count("Finished XLA compilation of jit(train_step)") == 1


def test_a_start_without_a_checkpoint_is_made_anew(finished: Path, tmp_path: Path):
    """Killed at any instant (C8), and with another corpus or tokenizer (C1)."""
    config, run = write_config(tmp_path), tmp_path / "run"
    for name in ("config.json.partial", "corpus/stdlib.jsonl.partial"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{")
    assert here("pretrain", f"--config={config}", "--config.train.num_steps=1", *NO_TEXT) == 0
    shutil.rmtree(run / "checkpoints")
    [start, *_] = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text(start + "\n")
    for name in ("held_out.jsonl.partial", "tokenizer/tokenizer.model.partial", "config.json.partial"):
        (run / name).write_text("{")
    other = tmp_path / "other.jsonl"
    other.write_text((finished.parent / "corpus.jsonl").read_text().replace("cat", "cow"))
    before = load_tokenizer(run / "tokenizer").fingerprint
    changed = [f"--config.data.corpus={other}", "--config.train.num_steps=2", "--config.model.num_layers=1", *NO_TEXT]
    assert here("pretrain", f"--config={config}", *changed) == 0
    assert load_tokenizer(run / "tokenizer").fingerprint != before
    assert "cow" in Run(run).held_out_texts()[0].text
    assert [record["step"] for record in metrics(run)] == [1, 2]


def test_a_longer_run_replaces_its_export_even_if_it_was_killed_before(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    moved = ["pretrain", f"--config={finished.parent / 'run.py'}", f"--config.train.run_dir={tmp_path / 'run'}"]
    assert exported_step(tmp_path / "run" / "export") == 12
    assert here(*moved, "--config.train.num_steps=13", "--config.checkpoint.export=false") == 0
    assert exported_step(tmp_path / "run" / "export") == 12
    assert here(*moved, "--config.train.num_steps=13") == 0
    assert exported_step(tmp_path / "run" / "export") == 13


def test_a_folder_name_may_hold_an_at_sign(finished: Path, tmp_path: Path, capsys):
    shutil.copytree(finished, tmp_path / "a@b")
    assert here("generate", tmp_path / "a@b", "--prompt=a", "--greedy") == 0
    assert here("generate", f"{tmp_path / 'a@b'}@8", "--prompt=a", "--greedy") == 0
    assert here("generate", tmp_path / "a@b" / "export", "--prompt=a", "--greedy") == 0


def test_nothing_held_out_is_said(finished: Path, tmp_path: Path, caplog, capsys):
    (tmp_path / "corpus.jsonl").write_text("".join((finished.parent / "corpus.jsonl").open().readlines()[:300]))
    config = write_config(tmp_path)
    assert here("pretrain", f"--config={config}", "--config.data.validation_fraction=1e-9",
                "--config.train.num_steps=1") == 0  # fmt: skip
    assert "no document is held out" in caplog.text
    assert "held-out" not in capsys.readouterr().out


def test_a_newcomers_txt_gives_streams_a_held_out_end_and_a_smaller_vocabulary(tmp_path: Path, capsys, caplog):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Chapter {i}. It was a day like day {i % 7} of a week.\n" for i in range(300)))
    config = write_config(tmp_path)
    with caplog.at_level("INFO", "ziggurat"):
        assert here("pretrain", f"--config={config}", f"--config.data.corpus={book}",
                    "--config.tokenizer.vocab_size=8000", "--config.train.num_steps=1", *NO_TEXT) == 0  # fmt: skip
    assert "8000 were asked for" in caplog.text
    held_out = Run(tmp_path / "run").held_out_texts()
    assert len(held_out) == 1
    assert held_out[0].text.startswith("Chapter 27")
