"""The script for sbatch, and a run on a real Slurm of two nodes on this machine."""

import argparse
import json
import os
import subprocess
from pathlib import Path

import pytest

from data.errors import InputError
from launch.commands import parse
from launch.slurm import newest_step_command, script, submit
from tests.launch.slurm_cluster import require_slurm, slurm_cluster
from tests.launch.small_run import TRAINING_ALONE, environment, here, metrics, write_config


def arguments(*flags: str) -> argparse.Namespace:
    return parse(["launch", "slurm", *flags])[1]


def written(*flags: str) -> str:
    return script(arguments(*flags), Path("/work here"))


def test_a_script_says_what_is_asked_and_quotes_what_needs_it():
    text = written("--nodes=4", "--tasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--time=1-00:00:00",
                   "--partition=h100", "--account=me", "--sbatch=--qos=high", "--sbatch=--signal=TERM@900", "--",
                   "pretrain", "--config=small", "--config.train.run_dir=runs/a b",
                   "--config.data.corpus=texts", "--config.train.batch_size=32",
                   "--config.train.accumulation_steps=1")  # fmt: skip
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "--job-name='a b'", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12",
        "--time=1-00:00:00", "--partition=h100", "--account=me", "--chdir='/work here'", "--output='a b-%j.log'",
        "--open-mode=append", "--signal=TERM@300", "--requeue", "--qos=high", "--signal=TERM@900",
    ]  # fmt: skip
    assert "pretrain --config=small '--config.train.run_dir=runs/a b'" in text
    assert "ls 'runs/a b/checkpoints'" in text
    assert "srun --label --kill-on-bad-exit=0 --wait=60 --cpus-per-task=12 \\" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_script_goes_to_a_file_or_to_standard_output(tmp_path: Path, capsys):
    flags = ("--nodes=2", "--", "pretrain", "--config=tiny")
    assert here("launch", "slurm", f"--output={tmp_path / 'job.sh'}", *flags) == 0
    assert capsys.readouterr().out == ""
    assert here("launch", "slurm", *flags) == 0
    assert capsys.readouterr().out == (tmp_path / "job.sh").read_text() == script(arguments(*flags), Path.cwd())


def test_a_container_is_given_its_folder_and_calls_its_own_ziggurat():
    text = written(
        "--container-image=me/ziggurat:1", "--container-mounts=/data:/data", "--", "pretrain", "--config=tiny"
    )
    assert ("--container-image=me/ziggurat:1 '--container-mounts=/work here:/work here,/data:/data' "
            "'--container-workdir=/work here'") in text  # fmt: skip
    assert "\n        ziggurat pretrain --config=tiny\n" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes=0", "--gpus-per-node=0"], "--nodes=0 must be at least 1\n--gpus-per-node=0 must be at least 1"),
        (["--tasks-per-node=3", "--gpus-per-node=8"], "--tasks-per-node=3 does not divide --gpus-per-node=8"),
        (["--sbatch=qos=high"], "--sbatch=qos=high: an option begins with -"),
        (["--container-mounts=/a:/a"], "--container-mounts without --container-image"),
        ([], "what can wait in a queue is pretrain"),
        (["--", "pretrain", "--config=small"], "data.corpus is not given; name it with --config.data.corpus=CORPUS"),
        (["--", "evaluate", "runs/tiny"], "what can wait in a queue is pretrain"),
        (["--", "pretrain", "--config=tiny", "--config.model.layers=2"], "model.layers: there is no such field"),
        (["--nodes=2", "--gpus-per-node=8", "--", "pretrain", "--config=tiny"],
         "train.batch_size / train.accumulation_steps = 8 cannot be shared by mesh.fsdp = 16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_submitted(flags: list[str], words: str):
    with pytest.raises(InputError) as caught:
        written(*flags)
    assert words in str(caught.value)


def test_a_refusal_of_slurm_is_passed_on():
    with pytest.raises(InputError, match="no-such-sbatch here; write the script and submit it where Slurm is"):
        submit("", ["no-such-sbatch"])
    with pytest.raises(InputError, match="sbatch: error: no such partition"):
        submit("", ["sh", "-c", "echo sbatch: error: no such partition >&2; exit 1"])
    assert submit("", ["echo", "17;cluster"]) == "17"


@pytest.mark.parametrize(
    ("statuses", "status", "says"),
    [
        ([0], 0, []),
        ([2], 2, []),
        ([75], 75, ["stopped, saved up to step 0: back to the queue"]),
        ([1, 0], 0, ["failed, saved up to step 0: starting again in 2 s"]),
        ([137, 1, 1, 1, 0], 1, [*(f"starting again in {s} s" for s in (2, 4, 8)), "nothing new saved in 4 starts"]),
        # The first process that fails prints why; the others end by a signal.
        (["2 143"], 2, []),
        (["75 1", 0], 0, ["starting again in 2 s"]),
        ([1, "a node dies", 0], 0, ["starting again in 2 s", "a node does not answer"]),
    ],
    ids=str,
)
def test_a_job_ends_goes_on_or_goes_back_to_the_queue_by_the_statuses_of_its_tasks(
    tmp_path: Path, statuses: list, status: int, says: list[str]
):
    # In place of Slurm's commands: each start has the next statuses, a task each, and gives the highest.
    if "a node dies" in statuses:
        (tmp_path / "dead").touch()
    (tmp_path / "statuses").write_text("".join(f"{line}\n" for line in statuses if line != "a node dies"))
    (tmp_path / "srun").write_text(
        f"""#!/bin/bash
if [[ $1 == true ]]; then ! rm {tmp_path}/dead 2>/dev/null; exit; fi
read -r -a tasks < {tmp_path}/statuses; sed -i 1d {tmp_path}/statuses
highest=0
while [[ $1 != sh ]]; do shift; done
for task in "${{tasks[@]}}"; do
    "$1" "$2" "$3" sh bash -c "exit $task"
    status=$?
    ((highest = status > highest ? status : highest))
done
exit $highest
"""
    )
    for name in ("scontrol", "sleep"):
        (tmp_path / name).write_text(f"#!/bin/bash\necho {name} $* >> {tmp_path}/called\n")
    for name in ("srun", "scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    text = written("--", "pretrain", "--config=tiny", f"--config.train.run_dir={tmp_path}/run")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == status, done.stderr
    assert [line for line in says if line not in done.stderr] == []
    assert len(done.stderr.splitlines()) == len(says)
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert ("scontrol requeue 17" in called) == (status == 75)


def test_a_job_that_is_told_to_stop_goes_back_to_the_queue_and_completes(tmp_path: Path, monkeypatch, capsys):
    require_slurm()
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config, run = write_config(tmp_path), tmp_path / "run"
    with slurm_cluster() as slurm:
        for name in ("SLURM_CONF", "PATH", "JAX_COORDINATOR_PORT"):
            monkeypatch.setenv(name, slurm.environment[name])
        assert here("launch", "slurm", "--nodes=2", "--time=10", "--submit", "--", "pretrain", f"--config={config}",
                    "--config.train.num_steps=100", "--config.checkpoint.every_steps=1000000",
                    *TRAINING_ALONE) == 0  # fmt: skip
        job = capsys.readouterr().out.strip()
        slurm.wait(lambda: (run / "metrics.jsonl").exists() and metrics(run), 90, "the run does not start")
        slurm.run("scancel", "--signal=TERM", job)
        try:
            slurm.wait(lambda: slurm.job(job)["JobState"] == "COMPLETED", 120, "the job does not complete")
        finally:
            print((tmp_path / f"run-{job}.log").read_text())
        assert slurm.job(job)["Restarts"] == "1"
        slurm.wait(lambda: not slurm.processes(f"SLURM_JOB_ID={job}"), 10, "something is left")
    assert [record["step"] for record in metrics(run)] == [*range(1, 101)]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "save", "stop", "start", "save", "end"]
    assert {event["processes"] for event in events if event["event"] == "start"} == {2}
    log = (tmp_path / f"run-{job}.log").read_text()
    assert f"ziggurat: stopped, saved up to step {events[2]['step']}: back to the queue" in log
    assert f"0: {run} resumes at step {events[2]['step']} of 100 steps" in log


def test_the_script_finds_the_newest_checkpoint_wherever_it_is(tmp_path: Path):
    def found(place: str | None) -> str:
        return subprocess.run(
            ["bash", "-c", newest_step_command(tmp_path, place)], capture_output=True, text=True
        ).stdout

    elsewhere = tmp_path / "else where"
    for place in (None, str(elsewhere), "gs://bucket/run"):
        assert found(place) == ""
    for folder, step in ((tmp_path / "checkpoints", 100), (elsewhere, 200)):
        for name in ("20", str(step), f"{step + 20}.damaged", f"{step + 40}.orbax-checkpoint-tmp"):
            (folder / name).mkdir(parents=True)
    saves = [{"time": "t", "event": "save", "step": step, "stall_seconds": 0.1} for step in (20, 300)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in saves))
    assert [found(place) for place in (None, str(elsewhere), "gs://bucket/run")] == ["100\n", "200\n", "300\n"]
