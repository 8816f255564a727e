"""The steady steps of a run, found in its logs, and a plan next to them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.launch.test_search import plan_of
from train.config.config import to_json
from train.config.reading import make_config
from train.planning.measured_steps import FIRST_STEPS, MeasuredSteps, compare, measured_steps
from train.planning.plan import Plan
from train.run.folder import Run

ROWS, T = 8, 32


def start(step: int, **fields: Any) -> dict[str, Any]:
    """A start event on 16 chips."""
    usual = {"devices": "16 × TPU v5 lite", "mesh": {"fsdp": 16}, "processes": 4, "host": "pod-0", "config": "now"}
    return {"time": "2026-11-30T00:00:00+00:00", "event": "start", "step": step, "seconds": {}} | usual | fields


def record(step: int, rate: float = 1000.0, **fields: Any) -> dict[str, Any]:
    """The line of a step."""
    figures = {
        "loss": 3.0,
        "loss_weight": 200.0,
        "utilization": 0.8,
        "data_wait_seconds": 0.25,
        "peak_share": rate / 4e3,
    }
    return {"step": step, "tokens_per_second": rate, "memory_bytes": 10**9 + step} | figures | fields


def read(folder: Path, records: list[dict], events: list[dict], **train: Any) -> MeasuredSteps:
    """The measured steps of a run with these lines."""
    run = Run(folder)
    values = {"data": {"segment_length": T}, "train": {"num_steps": 300, "batch_size": ROWS} | train}
    run.config_file.write_text(to_json(make_config(values)))
    for path, lines in ((run.metrics, records), (run.events, events)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return measured_steps(run, run.load_config())


def test_the_first_steps_of_a_start_do_not_count_and_medians_do(tmp_path: Path):
    rates = [1.0] * FIRST_STEPS + [900.0, 1000.0, 8000.0]
    measured = read(tmp_path, [record(s, rate) for s, rate in enumerate(rates, 1)], [start(0)])
    assert (measured.steps, measured.tokens_per_second, measured.mfu) == (3, 1000.0, 0.25)
    assert measured.step_seconds == ROWS * T / 1000
    assert measured.data_wait_seconds == 0.25
    assert measured.memory_bytes == 10**9 + FIRST_STEPS + 3
    assert (measured.devices, measured.device_kind, measured.processes) == (16, "TPU v5 lite", 4)
    assert measured.mesh == {"fsdp": 16}


def test_steps_are_those_of_the_newest_start_that_has_some_with_the_same_config(tmp_path: Path):
    records = [record(s, 100.0) for s in range(1, 31)] + [record(s, 700.0) for s in range(31, 61)]
    events = [start(0, devices="8 × TPU v4"), start(30), start(60, devices="4 × TPU v4")]
    measured = read(tmp_path, records, events)
    assert (measured.devices, measured.tokens_per_second, measured.steps) == (16, 700.0, 30 - FIRST_STEPS)
    events[2]["config"] = "changed"
    with pytest.raises(InputError, match="none of which is steady"):
        read(tmp_path, records, events)


def test_steps_of_smaller_batches_and_without_a_token_do_not_count(tmp_path: Path):
    records = [record(s, 1.0 if s <= 20 else 500.0) for s in range(1, 31)]
    records[25] |= {"loss": None, "loss_weight": 0.0, "tokens_per_second": 9.0}
    measured = read(tmp_path, records, [start(0)], batch_ramp_start=4, batch_ramp_steps=20)
    assert (measured.steps, measured.tokens_per_second) == (9, 500.0)


def test_figures_that_are_not_there_are_not_compared(tmp_path: Path):
    records = [record(s, peak_share=math.nan, memory_bytes=math.inf) for s in range(1, 20)]
    measured = read(tmp_path, records, [start(0)])
    assert measured.mfu is measured.memory_bytes is None
    assert compare(Plan(**plan_of(0.5)), measured).keys() == {"step_seconds"}


@pytest.mark.parametrize("fields", [{"devices": 16}, {"mesh": None}, {"mesh": {"fsdp": "x"}}], ids=str)
def test_without_the_names_of_its_devices_nothing_is_compared(fields: dict[str, Any], tmp_path: Path):
    with pytest.raises(InputError, match=r"events.jsonl: the start at step 0 does not name the run's devices"):
        read(tmp_path, [record(s) for s in range(1, 20)], [start(0, **fields)])


def test_without_a_steady_step_it_is_said_how_many_there_are(tmp_path: Path):
    for records, events in (([record(s) for s in range(1, 5)], [start(0)]), ([], []), ([record(99)], [])):
        with pytest.raises(InputError, match=f"has logged {len(records)} steps, none of which is steady"):
            read(tmp_path, records, events)


def test_a_ratio_is_planned_over_measured_and_a_cpu_process_has_the_memory_of_its_devices(tmp_path: Path):
    plan = dataclasses.replace(Plan(**plan_of(0.5)), tokens_per_second=512.0, estimated_mfu=0.5)
    measured = read(tmp_path, [record(s) for s in range(1, 20)], [start(0)])
    found = compare(plan, measured)
    assert {name: round(c.ratio, 6) for name, c in found.items() if name != "peak_bytes"} == {
        "step_seconds": round(0.5 / 0.256, 6),
        "tokens_per_second": 0.512,
        "mfu": 2.0,
    }
    assert found["peak_bytes"].planned == plan.peak_bytes_per_device
    on_cpus = dataclasses.replace(measured, device_kind="cpu")
    assert compare(plan, on_cpus)["peak_bytes"].planned == 4 * plan.peak_bytes_per_device
