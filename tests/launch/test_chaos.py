"""A run that is ill-treated ends as if nothing had been. `python -m tests.benchmarks.chaos` does it at length."""

import sys
from pathlib import Path

import pytest

from tests.chaos import Chaos, same_curve
from tests.launch.test_pretrain import assert_same_end


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_whatever_happens_the_end_is_that_of_an_undisturbed_run(tmp_path: Path):
    chaos = Chaos(tmp_path, processes=[2], devices=2, steps=120)
    chaos.start()
    for fault in ("NaN in one process", "kill and truncated checkpoint"):
        chaos.suffer(fault)
    chaos.to_the_end()
    assert any(path.name.endswith(".damaged") for path in (chaos.run / "checkpoints").iterdir())
    straight = chaos.straight(processes=2)
    assert same_curve(chaos.run, straight) == 0
    assert_same_end(chaos.run, straight, 120)
