"""Several processes on this machine: their output, statuses and signals, and that none is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from data.errors import InputError
from launch.local import add_arguments, launch, run

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


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
child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
sys.exit(launch([sys.executable, "-c", child], [dict(os.environ)] * 2))
"""


def start_launcher() -> tuple[subprocess.Popen, list[int]]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    assert launcher.stdout is not None
    return launcher, [int(launcher.stdout.readline().split()[1]) for _ in range(2)]


def test_a_signal_reaches_all_and_none_is_left():
    launcher, children = start_launcher()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 128 + signal.SIGTERM
    assert not any(map(is_running, children))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no death signal")
def test_none_is_left_when_the_launcher_itself_is_killed():
    launcher, children = start_launcher()
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_running, children)))


def test_bad_flags_are_named_together():
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(InputError) as caught:
        run(parser.parse_args(["--processes=0", "--devices=-1"]))
    assert len(str(caught.value).splitlines()) == 3
