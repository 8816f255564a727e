"""The memory settings with which processes that run training steps start."""

import argparse
import os
import platform
import subprocess
import sys
from unittest.mock import Mock

import pytest

from launch.cli import prepare_process
from launch.memory import LONG_RUN, SHORT_RUN, memory_for
from launch.presets import load_config
from launch.pretrain import run


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The command lines with which this process would have been replaced."""
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    return started


@pytest.mark.skipif(sys.platform != "linux", reason="the tunables are those of glibc")
def test_only_commands_that_run_steps_start_again_with_the_memory_settings(monkeypatch, started):
    for argv, files, own, tunables in (
        (["pretrain"], (), {}, SHORT_RUN), (["plan"], (), {}, LONG_RUN), (["generate"], (), {}, LONG_RUN),
        (["chat"], (), {}, LONG_RUN), (["evaluate"], (), {}, None), (["pretrain"], ("nul[l]",), {}, None),
        (["pretrain"], (), {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0"),
    ):  # fmt: skip
        monkeypatch.setattr("launch.cli.ACCELERATORS", files)
        monkeypatch.setattr(os, "environ", dict(own))
        started.clear()
        prepare_process(argv)
        assert os.environ.get("GLIBC_TUNABLES") == tunables, argv
        assert bool(started) == (tunables in (SHORT_RUN, LONG_RUN)), argv


def test_a_long_run_starts_once_more_where_the_settings_are_ours(monkeypatch, started):
    assert memory_for(load_config("tiny", {})) == SHORT_RUN
    assert memory_for(load_config("small_cpu", {})) == LONG_RUN
    monkeypatch.setattr("launch.memory.LONG_PRODUCTS", 0)
    monkeypatch.setattr(os, "execv", leave := Mock(side_effect=SystemExit))
    arguments = argparse.Namespace(config="tiny", overrides={})
    monkeypatch.setenv("GLIBC_TUNABLES", SHORT_RUN)
    with pytest.raises(SystemExit):
        run(arguments)
    assert os.environ["GLIBC_TUNABLES"] == LONG_RUN
    # A process that has them, or a user's own, goes on; here to an error.
    monkeypatch.setattr("train.devices.processes.join_processes", Mock(side_effect=InterruptedError))
    for own in (LONG_RUN, "glibc.malloc.check=0"):
        monkeypatch.setenv("GLIBC_TUNABLES", own)
        with pytest.raises(InterruptedError):
            run(arguments)
    assert leave.call_count == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the tunables are those of glibc")
def test_freed_memory_stays_in_a_process_that_trains():
    script = """
import resource, numpy
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(2**25)
before = faults()
numpy.ones(2**25)
print(faults() - before)
"""
    environment = os.environ | {"GLIBC_TUNABLES": LONG_RUN}
    count = subprocess.check_output([sys.executable, "-c", script], env=environment)
    # A new 256 MB have 128 large pages.
    assert int(count) < 16
