"""Standard streams of every kind, locales, and variables of the environment: one line each, and the right status."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.exit_status import PATH_ERRORS, report_error
from launch.streams import insistent_interrupts
from tests.launch.small_run import ROOT, environment, here
from train.stop import StopSignals

LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII, whatever locales are installed


def ended(command: str, **variables: str) -> tuple[int, str, str]:
    """Status and output of a line of bash, in which Z stands for the program."""
    line = command.replace("Z ", f"{sys.executable} -m launch.cli ")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=ROOT, env=environment() | variables, capture_output=True
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_files_are_utf8_in_every_locale_and_no_stream_fails(finished: Path, tmp_path: Path):
    page, usual = tmp_path / "page.html", tmp_path / "usual.html"
    assert here("report", finished, f"--output={usual}") == 0
    status, _, err = ended(f"Z report {finished} --output={page}", **LATIN)
    assert (status, err) == (0, "")
    assert "·" in usual.read_text(encoding="utf-8") or "×" in usual.read_text(encoding="utf-8")
    assert len(page.read_text(encoding="utf-8").splitlines()) == len(usual.read_text(encoding="utf-8").splitlines())
    assert ended("Z pretrain --help", **LATIN)[0] == 0
    assert ended("Z pretrain --help", PYTHONIOENCODING="ascii")[0] == 0


@pytest.mark.parametrize(
    ("line", "status", "err"),
    [
        ("Z presets | true", 0, ""),
        ("Z pretrain --help | head -1", 0, ""),
        ("Z presets >&-", 0, ""),
        ("Z presets <&- 2>&-", 0, ""),
        ("Z presets > /dev/full", 1, "standard output: No space left on device"),
        ("Z generate nosuch --prompts=- <&-", 2, "standard input has no prompts"),
        (r"Z generate $'a\e[31mb' --prompt=a", 2, "control character"),
        (r"Z export x --format=hf --to=", 2, "--to: is empty"),
        (r"Z generate nosuch$'\xff' --prompt=a", 2, "not valid UTF-8"),
    ],
)
def test_a_stream_that_is_closed_or_full_has_one_line_at_most(line: str, status: int, err: str):
    found = ended(line)
    assert found[0] == status
    assert err in found[2]
    assert bool(found[2]) == bool(err)
    assert "\x1b" not in found[2]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PLATFORMS": "foo"}, "JAX cannot start with"),
        ({"JAX_PLATFORMS": "cpu,foo"}, "JAX cannot start with"),
        ({"JAX_NUM_CPU_DEVICES": "x"}, "Invalid value"),
        ({"XLA_FLAGS": "--x"}, "XLA_FLAGS=--x: Unknown flag"),
    ],
)
def test_a_variable_with_which_jax_cannot_start_is_named(variables: dict[str, str], words: str, finished: Path):
    status, out, err = ended(f"Z generate {finished} --prompt=a", **variables)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert "X64" not in err


@pytest.mark.parametrize("number", sorted(PATH_ERRORS), ids=errno.errorcode.get)
def test_every_error_about_a_path_is_the_users(number: int, capsys):
    assert report_error(OSError(number, os.strerror(number), "some/path")) == 2
    assert capsys.readouterr().err == f"ziggurat: some/path: {os.strerror(number)}; name another path\n"


def test_a_link_to_itself_is_the_users_error(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((RuntimeError, OSError)) as caught:
        (tmp_path / "loop").resolve(strict=True)
    assert report_error(caught.value) == 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EADDRINUSE, errno.ETIMEDOUT, errno.ENOSPC])
def test_every_other_error_of_the_system_is_a_fault_of_one_line(number: int, capsys):
    assert report_error(OSError(number, os.strerror(number))) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_code_that_ends_the_process_is_no_success(capsys):
    assert report_error(SystemExit(0)) == 1
    assert "sys.exit(0)" in capsys.readouterr().err


def test_an_interrupt_that_is_dropped_comes_again(monkeypatch):
    monkeypatch.setattr("launch.streams.SECONDS_BETWEEN_INTERRUPTS", 0.05)
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dropped = False
    try:
        with pytest.raises(KeyboardInterrupt), insistent_interrupts():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                dropped = True
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                pass
    finally:
        for number, handler in zip((signal.SIGALRM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert dropped


@pytest.mark.parametrize("is_ignored", [False, True], ids=["heard", "nohup"])
def test_a_terminal_that_closes_asks_a_run_to_stop(is_ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with StopSignals() as signals:
            signals.noted = True
            signal.raise_signal(signal.SIGHUP)
            deadline = time.monotonic() + (0.2 if is_ignored else 30)
            while not signals.asked and time.monotonic() < deadline:
                time.sleep(0.01)
            assert signals.asked != is_ignored
    finally:
        signal.signal(signal.SIGHUP, before)
