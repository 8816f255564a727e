"""Several processes on this machine: their output, statuses and signals, and that none is left."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import InputError
from launch.local import GRACE, add_arguments, free_port, launch, run
from tests.launch.small_run import ROOT, command, write_config


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
    assert launch(python(code), environments(3)) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == sorted(f"[{i}] {line}" for i in range(3) for line in (f"out {i}", "end"))
    assert sorted(err.splitlines()) == [f"[{i}] err {i}" for i in range(3)]


def test_the_first_failure_is_the_status_and_ends_the_others():
    began = time.monotonic()
    assert launch(python("sys.exit(7) if i == '1' else time.sleep(60)"), environments(3)) == 7
    assert (
        launch(python("os.kill(os.getpid(), signal.SIGKILL) if i == '0' else time.sleep(60)"), environments(2)) == 137
    )
    assert time.monotonic() - began < 30


LAUNCHER = """
import os, sys
from launch.local import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1]], [dict(os.environ)] * 2))
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
sys.exit(main(["pretrain", "--config={write_config(tmp_path)}"]))
"""
    joined = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "ZIGGURAT_COORDINATOR": f"127.0.0.1:{free_port()}",
        "ZIGGURAT_NUM_PROCESSES": "2",
    }
    began = time.monotonic()
    assert launch([sys.executable, "-c", code], [environment | joined for environment in environments(2)]) == 1
    assert time.monotonic() - began < 90
    assert "[1] RuntimeError: a fault" in capfd.readouterr().err


def test_processes_that_train_end_at_once_on_a_signal(tmp_path: Path):
    launcher = command("launch", "local", "--processes=2", "--", "pretrain", f"--config={write_config(tmp_path)}",
                       "--config.train.num_steps=1000000", stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert launcher.stderr is not None
        assert any(" loss " in line for line in itertools.islice(launcher.stderr, 100))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == 2
        began = time.monotonic()
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - began < GRACE / 2
        assert not any(is_running(int(child)) for child in children)
    finally:
        launcher.kill()


def test_bad_flags_are_named_together():
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(InputError) as caught:
        run(parser.parse_args(["--processes=0", "--devices=-1"]))
    assert len(str(caught.value).splitlines()) == 3
