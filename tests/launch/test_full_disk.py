"""A disk that fills up during a run and is mended: one line of error, no bits lost (C8)."""

import errno
import json
import resource
import shutil
import subprocess
from pathlib import Path

import train.loop
from data.errors import StorageError
from launch.exit_status import report_error
from launch.local import newest_step
from tests.launch.small_run import back_to, command, here, metrics
from train.run.events import Events


def test_a_full_disk_ends_a_run_in_one_line_and_the_same_command_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, capsys
):
    run = back_to(8, finished, tmp_path / "run")
    flags = ["pretrain", f"--config={run}"]
    process = command(*flags, devices=8, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # No file of the process grows beyond this: its logs do not, but a checkpoint's would.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    err = process.communicate()[1]
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith(
        f"ziggurat: the checkpoint of step 12 cannot be written to {run / 'checkpoints'}: File too large ("
    )
    assert last.endswith("MB free); once it can be written, the same command resumes the run")
    assert "Traceback" not in err
    assert not (run / "lease.json").exists()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "fault"
    assert "File too large" in events[-1]["error"]

    assert here(*flags) == 0
    assert "resumes at step 8" in capsys.readouterr().err
    progress = [folder / "checkpoints" / "12" / "progress" / "metadata" for folder in (run, finished)]
    assert progress[0].read_bytes() == progress[1].read_bytes()
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))


def test_the_first_error_is_raised_even_if_the_disk_is_full(finished: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")

    def refuses(*_: object, **__: object) -> None:
        raise StorageError("full")

    def fails(*_: object) -> None:
        monkeypatch.setattr(Events, "write", refuses)
        monkeypatch.setattr(train.loop.Checkpoints, "wait", refuses)
        raise RuntimeError("the first")

    monkeypatch.setattr(train.loop.Training, "train", fails)
    assert here("pretrain", f"--config={tmp_path / 'run'}", "--config.train.num_steps=14") == 1
    assert "RuntimeError: the first" in capsys.readouterr().err


def test_a_full_disk_is_a_fault_that_may_pass(capsys):
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/config.json"), "runs/a/config.json: No space left"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (StorageError("an event cannot be written to x: gone"), "an event cannot be written to x: gone"),
    ):
        assert report_error(error) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    # The user must change a path that is not permitted.
    assert report_error(PermissionError(errno.EACCES, "Permission denied", "/runs")) == 2


def test_checkpoints_may_be_moved_to_another_disk_and_are_found_from_everywhere(
    finished: Path, tmp_path: Path, monkeypatch, capsys
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished, run)
    monkeypatch.chdir(tmp_path)
    flags = ["pretrain", f"--config={run}", "--config.train.num_steps=13"]
    assert here(*flags, "--config.checkpoint.dir=elsewhere") == 2
    assert "has saved its step 12 in " in capsys.readouterr().err
    assert not elsewhere.exists()
    (run / "checkpoints").rename(elsewhere)
    assert here(*flags, "--config.checkpoint.dir=elsewhere") == 0
    assert not (run / "checkpoints").exists()
    assert {path.name for path in elsewhere.iterdir()} == {"12", "13"}
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert here("evaluate", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 13
    assert newest_step(run) == 13
