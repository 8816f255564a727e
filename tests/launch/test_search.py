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


def candidate(seconds: float, batch_size: int = 8) -> Candidate:
    """A candidate with this estimate in seconds; its number of rows identifies it."""
    changes = dict.fromkeys(SEARCHED, "1") | {"train.batch_size": str(batch_size)}
    return Candidate(changes, MESH, batch_size, round(seconds * 100), Estimate(1.0, 1.0, seconds, 0.0, 0.0))


def plan_of(seconds: float, fits: bool = True, rows: int = 8) -> dict[str, Any]:
    """The object that `plan --json` prints for a step of this duration, in rows of one token."""
    return asdict(
        Plan(
            topology="t", device_kind="TPU v5 lite", devices=4, mesh=MESH, attention="plain", remat_policy="full",
            rows_per_step=rows, tokens_per_step=rows, fits=fits, refused=None, memory_bytes_per_device=2**34,
            peak_bytes_per_device=2**30, argument_bytes_per_device=0, memory={}, model_flops_per_device=1.0,
            lower_seconds=0.1, compile_seconds=1.0, compiled_before=False, tokens=100.0, estimated_step_seconds=seconds,
            estimated_mfu=0.5, days=3.0, cost=1234.5,
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


def test_when_time_is_up_none_is_started_but_for_sizes_of_which_none_fits_yet(compilers, caplog):
    caplog.set_level("INFO", "ziggurat")
    begun = compilers({1.0: prints(plan_of(1.0, fits=False)), 1.01: prints(plan_of(1.01)), 1.02: prints(plan_of(1.02)),
                       1.5: prints(plan_of(1.5, rows=16))})  # fmt: skip
    found = [candidate(1.0), candidate(1.01), candidate(1.02), candidate(1.5, 16)]
    assert len(compile_best(found, 4, [], 0.0)) == 3
    assert begun == [1.0, 1.01, 1.5]
    assert "time is up: 1 more may be faster; --search=N compiles N" in caplog.text


def test_batches_are_ranked_by_tokens_a_second_with_days_and_dollars(compilers):
    compilers({1.0: prints(plan_of(1.0)), 1.5: prints(plan_of(1.5, rows=16)), 4.0: prints(plan_of(4.0, rows=24))})
    outcomes = compile_best([candidate(1.0), candidate(1.5, 16), candidate(4.0, 24)], 3, [])
    assert [outcome.candidate.batch_size for outcome in outcomes] == [16, 8, 24]
    assert [outcome.tokens_per_second for outcome in outcomes] == [16 / 1.5, 8.0, 6.0]
    text = search_text(outcomes, 3, True)
    assert "   1  batch 16 on fsdp 4, 150 rows, 1: 1.50 s, 11 tokens/s, 50.0% MFU, 1.00 GiB, 3.0 days, $1,23" in text
    assert "--config.train.batch_size=16\n" in text
    assert "flags of plan and pretrain for 100 tokens:" in text
    assert text.endswith("--config.train.num_steps=7")
    assert "num_steps" not in search_text(outcomes, 3)


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


def test_batch_sizes_that_are_asked_for_are_compared_by_the_same_tokens(tmp_path: Path, capsys):
    require("libtpu")
    file = write_config(tmp_path)
    flags = [f"--config={file}", "--topology=v5e:2x2", "--config.mesh.tensor=1", "--config.mesh.context=1",
             "--config.mesh.data=1", "--config.train.accumulation_steps=1", "--config.model.remat_policy=full",
             "--search", "--batch-sizes=4,8", "--price=2"]  # fmt: skip
    assert here("plan", *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 2
    assert {plan["rows_per_step"] for plan in found["plans"]} == {4, 8}
    assert {plan["tokens"] for plan in found["plans"]} == {12 * 8 * 32}
    speeds = [plan["tokens_per_second"] for plan in found["plans"]]
    assert speeds == sorted(speeds, reverse=True)
    assert [plan["cost"] for plan in found["plans"]] == sorted(plan["cost"] for plan in found["plans"])


def test_a_batch_size_that_cannot_fit_is_left_out_of_those_that_are_compared(
    tmp_path: Path, monkeypatch, capsys, caplog
):
    require("libtpu")
    compared = []
    monkeypatch.setattr(search, "compile_best", lambda found, *_: compared.extend(found) or [])
    flags = [f"--config={write_config(tmp_path)}", "--topology=v5e:2x2", "--config.train.accumulation_steps=1",
             "--config.data.num_streams=4", "--config.model.num_layers=16", "--config.model.remat_policy=full",
             "--search"]  # fmt: skip
    assert here("plan", *flags, "--batch-sizes=8,16777216", "--json") == 0
    assert {candidate.batch_size for candidate in compared} == {8}
    assert "left out: none of" in caplog.text
    assert here("plan", *flags, "--batch-sizes=16777212,16777216") == 2
    assert "no step of any of these batch sizes may fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--search", "--batch-sizes=256,"], "--batch-sizes=256,: give whole numbers of rows, as in"),
        (["--search", "--batch-sizes=0"], "--batch-sizes=0: give whole numbers"),
        (["--batch-sizes=8"], "goes with --search; for a single plan: --config.train.batch_size=B"),
        (["--search", "--batch-sizes=8", "--config.train.batch_size=8"], "give one of the two"),
        (["--search", "--batch-sizes=8,6", "--config.mesh.fsdp=4"], "nearest size that works"),
        (["--search", "--batch-sizes=8,12", "--config.data.num_streams=8"], "train.batch_size = 12"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_batch_sizes_that_cannot_be_are_said_before_anything_is_compiled(
    flags: list[str], words: str, tmp_path: Path, monkeypatch, capsys
):
    require("libtpu")
    monkeypatch.setattr(search, "compile_best", None)
    assert here("plan", f"--config={write_config(tmp_path)}", "--topology=v5e:2x2", *flags) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert out == ""
