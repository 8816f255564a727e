"""Several processes on this machine: their output, statuses and signals, and that none is left."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import InputError
from launch.local import Exit, add_arguments, free_port, newest_step, process_environment, run, run_processes, supervise
from tests.launch.small_run import ROOT, TRAINING_ALONE, command, environment, here, write_config


def environments(number: int) -> list[dict[str, str]]:
    return [dict(os.environ) | {"ZIGGURAT_PROCESS_ID": str(i)} for i in range(number)]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal; i = os.environ['ZIGGURAT_PROCESS_ID']; {code}"]


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_line_of_both_streams_has_its_process_before_it(capfd):
    code = "print('out', i); print('err', i, file=sys.stderr); print('end', end='')"
    assert run_processes(python(code), environments(3)) == (0, False)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == sorted(f"[{i}] {line}" for i in range(3) for line in (f"out {i}", "end"))
    assert sorted(err.splitlines()) == [f"[{i}] err {i}" for i in range(3)]


def test_the_first_failure_is_the_status_and_ends_the_others():
    began = time.monotonic()
    assert run_processes(python("sys.exit(7) if i == '1' else time.sleep(60)"), environments(3)).status == 7
    assert (
        run_processes(
            python("os.kill(os.getpid(), signal.SIGKILL) if i == '0' else time.sleep(60)"), environments(2)
        ).status
        == 137
    )
    assert time.monotonic() - began < 30


def test_one_that_stopped_leaves_the_others_time_to_save(capfd):
    told = "signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))"
    code = f"{told}; time.sleep(0.5 + int(i)); print('saved', flush=True); os._exit(75)"
    assert run_processes(python(code), environments(2)) == (75, False)
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] saved", "[1] saved"]


LAUNCHER = """
import os, sys
from launch.local import newest_step, run_processes
sys.exit(run_processes([sys.executable, "-c", sys.argv[1]], [dict(os.environ)] * 2).status)
"""


def start_launcher(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def start_sleepers() -> tuple[subprocess.Popen, list[int]]:
    launcher = start_launcher("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    return launcher, [int(launcher.stdout.readline().split()[1]) for _ in range(2)]


def test_a_signal_reaches_all_and_none_is_left():
    launcher, children = start_sleepers()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 128 + signal.SIGTERM
    assert not any(map(is_running, children))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no death signal")
def test_none_is_left_when_the_launcher_itself_is_killed():
    launcher, children = start_sleepers()
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_running, children)))


def test_processes_go_on_when_nobody_reads_their_output():
    launcher = start_launcher("for _ in range(500): print('x' * 1000, flush=True)")
    launcher.stdout.readline()
    launcher.stdout.close()
    assert launcher.wait(20) == 0
    assert launcher.stderr.read() == ""


def test_an_error_in_one_process_ends_all_with_its_message(tmp_path: Path):
    missing = f"--config.tokenizer.path={tmp_path / 'none'}"
    launcher = command("launch", "local", "--processes=2", "--", "pretrain", f"--config={write_config(tmp_path)}",
                       missing, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        _, err = launcher.communicate(timeout=90)
    finally:
        launcher.kill()
    assert launcher.returncode == 2
    assert "[0] ziggurat: " in err
    assert "holds no tokenizer" in err
    assert "Traceback" not in err


def test_a_fault_of_one_process_as_it_trains_ends_all_with_its_traceback(tmp_path: Path, capfd):
    code = f"""
import os, sys, train.loop
from launch.cli import main

class Loader(train.loop.Loader):
    def __next__(self):
        raise RuntimeError("a fault")

if os.environ["ZIGGURAT_PROCESS_ID"] == "1":
    train.loop.Loader = Loader
sys.exit(main(["pretrain", "--config={write_config(tmp_path)}", *{TRAINING_ALONE}]))
"""
    joined = environment() | {
        "ZIGGURAT_COORDINATOR": f"127.0.0.1:{free_port()}",
        "ZIGGURAT_NUM_PROCESSES": "2",
    }
    began = time.monotonic()
    assert (
        run_processes([sys.executable, "-c", code], [joined | {"ZIGGURAT_PROCESS_ID": id} for id in "01"]).status == 1
    )
    assert time.monotonic() - began < 90
    assert "[1] RuntimeError: a fault" in capfd.readouterr().err


def test_a_signal_to_one_process_or_to_the_launcher_saves_on_all_and_the_run_goes_on(tmp_path: Path, capsys):
    train = ["pretrain", f"--config={write_config(tmp_path)}", "--config.checkpoint.every_steps=1000000",
             *TRAINING_ALONE]  # fmt: skip
    launcher = command("launch", "local", "--processes=2", "--", *train, "--config.train.num_steps=1000000",
                       stderr=subprocess.PIPE)  # fmt: skip

    def children() -> list[int]:
        return [int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]

    try:
        assert launcher.stderr is not None
        assert any(" loss " in line for line in itertools.islice(launcher.stderr, 100))
        os.kill(children()[1], signal.SIGTERM)
        said = list(itertools.takewhile(lambda line: "resumes at step" not in line, launcher.stderr))
        # The launcher has started them again.
        assert any(" loss " in line for line in itertools.islice(launcher.stderr, 100))
        assert len(left := children()) == 2
        launcher.send_signal(signal.SIGTERM)
        rest = launcher.stderr.read()
        assert launcher.wait(60) == 75
        assert not any(map(is_running, left))
    finally:
        launcher.kill()
    stopped = re.search(r"stopped after step (\d+); the same command resumes the run", rest)
    assert stopped, rest
    step = int(stopped[1])
    assert here(*train, f"--config.train.num_steps={step + 2}") == 0
    assert f"resumes at step {step} of {step + 2} steps" in capsys.readouterr().err
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    first = next(event["step"] for event in events if event["event"] == "stop")
    assert f"ziggurat: status 75, saved up to step {first}: starting again\n" in said
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0),
        ("save", first),
        ("stop", first),
        ("start", first),
        ("save", step),
        ("stop", step),
        ("start", step),
        ("save", step + 2),
        ("end", step + 2),
    ]


def test_a_signal_before_training_ends_at_once_and_the_same_command_begins_again(tmp_path: Path):
    train = ("pretrain", f"--config={write_config(tmp_path)}", "--config.train.num_steps=1000000", *TRAINING_ALONE)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup ignores it
        run = command(*train, stderr=subprocess.PIPE)
        try:
            assert run.stderr is not None
            before = list(itertools.takewhile(lambda line: "training a tokenizer" not in line, run.stderr))
            run.send_signal(number)
            assert run.wait(30) == status
            said = run.stderr.read().splitlines()
            assert said[-1] == f"ziggurat: {number.name}: ended at once; the same command resumes"
            # Of the start before nothing is left that this one would wait for.
            assert "waiting" not in "".join(before)
        finally:
            run.kill()
    assert_a_second_signal_ends_at_once(train)


def assert_a_second_signal_ends_at_once(train: tuple[str, ...]) -> None:
    """The command trains, and is asked to stop twice."""
    run = command(*train, stderr=subprocess.PIPE)
    try:
        assert run.stderr is not None
        before = list(itertools.takewhile(lambda line: " loss " not in line, itertools.islice(run.stderr, 100)))
        assert "waiting" not in "".join(before)
        run.send_signal(signal.SIGSTOP)
        # Both come while it does nothing, so that it cannot have stopped by itself between them.
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGCONT)
        assert run.wait(30) == 75
        assert "ended at once" in run.stderr.read()
    finally:
        run.kill()


def test_a_run_whose_data_stalls_shows_its_threads_and_ends(tmp_path: Path):
    code = f"""
import sys, time, train.loop
from launch.cli import main

class Loader(train.loop.Loader):
    def __next__(self):
        time.sleep(600)

train.loop.Loader = Loader
sys.exit(main(["pretrain", "--config={write_config(tmp_path)}", "--config.train.watchdog_seconds=2"]))
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "Timeout (0:00:02)!" in run.stderr
    assert "in __next__" in run.stderr
    assert run.stderr.count("Thread 0x") > 2


def supervised(statuses: list[int], folder: Path, restarts: int = 3) -> tuple[int, list[float], int]:
    """(status, pauses, starts) where starts end so; one of 75 or more has saved a step more before."""
    left, pauses = list(statuses), []

    def start() -> Exit:
        status = left.pop(0)
        if status >= 75:
            (folder / "checkpoints" / str(len(statuses) - len(left))).mkdir(parents=True)
        return Exit(status, False)

    status = supervise(start, folder, restarts, pauses.append)
    return status, pauses, len(statuses) - len(left)


def test_a_run_is_started_again_by_its_exit_status(tmp_path: Path):
    assert supervised([0, 1], tmp_path) == (0, [], 1)
    assert supervised([2, 0], tmp_path) == (2, [], 1)
    assert supervised([75, 75, 0], tmp_path / "stopped") == (0, [0, 0], 3)
    # Each fault in a row waits longer; a start that has saved anything resets the count.
    assert supervised([1, 1, 137, 1, 0], tmp_path / "faults") == (0, [2, 4, 1, 2], 5)
    # To be stopped is no fault, however often.
    stopped_early = iter([75] * 9 + [0])
    assert supervise(lambda: Exit(next(stopped_early), False), tmp_path / "early", 3, lambda _: None) == 0
    assert supervised([1] * 9, tmp_path / "vain") == (1, [2, 4, 8], 4)
    assert supervised([1, 0], tmp_path / "once", restarts=0) == (1, [], 1)
    asked = supervise(lambda: Exit(75, True), tmp_path, 3, lambda _: pytest.fail("it was asked to end"))
    assert asked == 75


def test_each_process_has_its_own_share_of_the_gpus():
    shown = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    found = [process_environment(shown, i, 2) for i in range(2)]
    assert [environment["JAX_LOCAL_DEVICE_IDS"] for environment in found] == ["0,1", "2,3"]
    assert [environment["ZIGGURAT_PROCESS_ID"] for environment in found] == ["0", "1"]
    assert "JAX_LOCAL_DEVICE_IDS" not in process_environment({"CUDA_VISIBLE_DEVICES": ""}, 0, 2)
    with pytest.raises(InputError, match="3 processes cannot share the 4 GPUs"):
        process_environment(shown, 0, 3)


def test_what_is_saved_elsewhere_counts_too(tmp_path: Path):
    for place in (tmp_path / "elsewhere", "gs://runs/one"):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps({"checkpoint": {"dir": str(place)}}))
        assert newest_step(run) == 0
        (tmp_path / "elsewhere" / "40").mkdir(parents=True)
        lines = [{"event": "save", "step": 20}, {"event": "save", "step": 40}, {"event": "fault"}]
        (run / "events.jsonl").write_text("".join(json.dumps({"time": "t"} | line) + "\n" for line in lines) + '{"ti')
        assert newest_step(run) == 40
        shutil.rmtree(tmp_path / "elsewhere")
        shutil.rmtree(run)


def test_bad_flags_are_named_together():
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(InputError) as caught:
        run(parser.parse_args(["--processes=0", "--devices=-1", "--restarts=-1"]))
    assert len(str(caught.value).splitlines()) == 4
