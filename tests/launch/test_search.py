"""`ziggurat plan --search` as its user meets it, and the queue of compilers behind it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch import plan_search as search
from launch.plan_search import Compiler, compile_best, search_text
from tests.launch.small_run import here, write_config
from tests.peers import require
from train.planning.estimate import Estimate
from train.planning.plan import Plan
from train.planning.search import SEARCHED, Candidate

MESH = {"slice": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 1}


def candidate(seconds: float) -> Candidate:
    """A candidate with this estimate in seconds; its number of rows identifies it."""
    return Candidate(dict.fromkeys(SEARCHED, "1"), MESH, round(seconds * 100), Estimate(1.0, 1.0, seconds, 0.0, 0.0))


def plan_of(seconds: float, fits: bool = True) -> dict[str, Any]:
    """The object that `plan --json` prints for a step of this duration."""
    return asdict(
        Plan(
            topology="t", device_kind="TPU v5 lite", devices=4, mesh=MESH, attention="plain", remat_policy="full",
            rows_per_step=8, tokens_per_step=8, fits=fits, refused=None, memory_bytes_per_device=2**34,
            peak_bytes_per_device=2**30, argument_bytes_per_device=0, memory={}, model_flops_per_device=1.0,
            lower_seconds=0.1, compile_seconds=1.0, compiled_before=False, tokens=1.0, estimated_step_seconds=seconds,
            estimated_mfu=0.5,
        )
    )  # fmt: skip


@pytest.fixture
def compilers(monkeypatch) -> Callable[[dict[float, str]], list[float]]:
    """Replaces compilers by commands that print what a test wants; returns a list of those that were started."""
    begun: list[float] = []

    def install(says: dict[float, str]) -> list[float]:
        def begin(candidate: Candidate, flags: Any, files: str) -> Compiler:
            seconds = candidate.estimate.compute_seconds
            begun.append(seconds)
            with open(f"{files}.json", "wb") as output, open(f"{files}.log", "wb") as said:
                command = [sys.executable, "-c", says[seconds]]
                return Compiler(candidate, subprocess.Popen(command, stdout=output, stderr=said), files)

        monkeypatch.setattr(search, "start_compiler", begin)
        monkeypatch.setattr(search, "max_compilers", lambda: 1)
        return begun

    return install


def prints(plan: dict[str, Any]) -> str:
    return f"print({json.dumps(plan)!r})"


def test_programs_are_compiled_in_the_order_of_their_estimates_until_none_can_be_faster(compilers):
    begun = compilers({1.0: prints(plan_of(1.2)), 1.1: prints(plan_of(1.1)), 1.15: prints(plan_of(1.3))})
    outcomes = compile_best([candidate(s) for s in (1.0, 1.1, 1.15, 9.0, 9.5)], 5, [])
    assert begun == [1.0, 1.1, 1.15]
    assert [outcome.seconds for outcome in outcomes] == [1.1, 1.2, 1.3]


def test_no_more_are_compiled_than_asked(compilers):
    begun = compilers({s: prints(plan_of(s)) for s in (1.0, 1.01, 1.02)})
    assert len(compile_best([candidate(s) for s in (1.0, 1.01, 1.02)], 2, [])) == len(begun) == 2


def test_what_does_not_fit_or_fails_is_ranked_last_and_said(compilers):
    fails = "import sys; sys.exit('the compiler fell over')"
    compilers({1.0: prints(plan_of(0.5, fits=False)), 1.01: fails, 1.02: prints(plan_of(1.1))})
    outcomes = compile_best([candidate(s) for s in (1.0, 1.01, 1.02)], 3, [])
    assert [outcome.seconds for outcome in outcomes] == [1.1, math.inf, math.inf]
    text = search_text(outcomes, 7)
    assert "7 legal ways to run the step that may fit, 3 compiled" in text
    assert "failed: the compiler fell over" in text
    assert "does not fit: 1.00 GiB" in text
    assert "--config.mesh.fsdp=1" in text


def test_an_interrupt_ends_it_with_what_there_is(compilers, monkeypatch):
    compilers({1.0: prints(plan_of(1.1)), 1.01: "import time; time.sleep(600)"})
    kept: list[Compiler] = []
    start = search.start_compiler
    monkeypatch.setattr(search, "start_compiler", lambda *of: kept.append(start(*of)) or kept[-1])
    pause = search.time.sleep

    def interrupted(seconds: float) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        pause(seconds)

    monkeypatch.setattr("launch.plan_search.time.sleep", interrupted)
    outcomes = compile_best([candidate(1.0), candidate(1.01)], 2, [])
    assert [outcome.seconds for outcome in outcomes] == [1.1]
    assert all(compiler.process.poll() is not None for compiler in kept)


def test_the_best_of_a_search_is_the_best_of_all(tmp_path: Path, capsys):
    require("libtpu")
    file = write_config(tmp_path)
    flags = [f"--config={file}", "--topology=v5e:2x2", "--config.mesh.tensor=1", "--config.mesh.context=1",
             "--config.train.accumulation_steps=1", "--config.model.remat_policy=full"]  # fmt: skip
    seconds = []
    for data in (1, 2, 4):
        assert here("plan", *flags, f"--config.mesh.data={data}", "--json") == 0
        seconds.append(json.loads(capsys.readouterr().out)["estimated_step_seconds"])
    assert here("plan", *flags, "--search", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 3
    assert found["plans"][0]["estimated_step_seconds"] == min(seconds)
    assert found["plans"][0]["compiled_before"] is True
