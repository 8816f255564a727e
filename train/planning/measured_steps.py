"""Figures that a run measured of its own steady steps, and how they compare with a plan of the same step."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.errors import InputError
from train.config.config import Config
from train.planning.plan import Plan
from train.run.events import read_events
from train.run.folder import Run
from train.run.step_log import median_rate, read_metrics
from train.step.schedule import batch_size

# The first steps of a start are not steady, and a logged rate is a mean over as many steps.
FIRST_STEPS = 10


@dataclass(frozen=True)
class MeasuredSteps:
    """The devices of a run's newest start with steady steps, and medians over these steps."""

    folder: str
    host: str
    processes: int
    devices: int
    device_kind: str
    mesh: dict[str, int]  # sizes of the mesh axes above 1
    steps: int  # number of steady steps
    step_seconds: float
    tokens_per_second: float
    data_wait_seconds: float
    mfu: float | None  # share of the peak, None where the log has none
    memory_bytes: int | None  # most bytes in use on a device so far, or in the process where devices report none


class Comparison(NamedTuple):
    """A figure of a plan next to the one that a run measured."""

    planned: float
    measured: float
    ratio: float  # planned / measured


def measured_steps(run: Run, config: Config) -> MeasuredSteps:
    """Reads the logs of a run. Raises InputError if they have no steady step, or do not say on which devices."""
    records, events = read_metrics(run.metrics), read_events(run.events)
    start, steady = _steady(config, records, [event for event in events if event["event"] == "start"])
    if not steady:
        raise InputError(
            f"{run.folder} has logged {len(records)} steps, none of which is steady: the first {FIRST_STEPS} of each "
            "start and those of smaller batches are not counted; let it run for longer, or give "
            f"--config={run.folder} to plan it without a comparison"
        )
    devices, kind, mesh = _devices(start)
    if not devices:
        raise InputError(
            f"{run.events}: the start at step {start['step']} does not name the run's devices and mesh; give "
            f"--config={run.folder} to plan it without a comparison"
        )
    rate = median_rate(steady)
    shares, memory = _positive(steady, "peak_share"), _positive(steady, "memory_bytes")
    processes = start.get("processes")
    return MeasuredSteps(
        folder=str(run.folder),
        host=str(start.get("host", "")),
        processes=processes if isinstance(processes, int) and processes > 0 else 1,
        devices=devices,
        device_kind=kind,
        mesh=mesh,
        steps=len(steady),
        step_seconds=config.train.batch_size * config.data.segment_length / rate,
        tokens_per_second=rate,
        data_wait_seconds=statistics.median(record["data_wait_seconds"] for record in steady),
        mfu=statistics.median_high(shares) if shares else None,
        memory_bytes=round(max(memory)) if memory else None,
    )


def compare(plan: Plan, measured: MeasuredSteps) -> dict[str, Comparison]:
    """Returns the comparison of each figure that both have: `step_seconds`, `tokens_per_second`, `mfu`, `peak_bytes`.

    CPU devices report no memory, so there the peak of a process is compared with the sum of its devices' peaks.
    """
    of_process = measured.devices // measured.processes if measured.device_kind == "cpu" else 1
    pairs = {
        "step_seconds": (plan.estimated_step_seconds, measured.step_seconds),
        "tokens_per_second": (plan.tokens_per_second, measured.tokens_per_second),
        "mfu": (plan.estimated_mfu, measured.mfu),
        "peak_bytes": (plan.peak_bytes_per_device * of_process, measured.memory_bytes),
    }
    return {name: Comparison(ours, theirs, ours / theirs) for name, (ours, theirs) in pairs.items() if ours and theirs}


def _steady(
    config: Config, records: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Returns the newest start with the run's present config that has steady steps, and these steps."""
    end = max((record["step"] for record in records), default=0)
    for start in reversed(starts):
        steady = [
            record
            for record in records
            if start["step"] + FIRST_STEPS < record["step"] <= end
            and _positive([record], "tokens_per_second")
            and record["loss_weight"] > 0
            and batch_size(config, record["step"] - 1) == config.train.batch_size
        ]
        if steady and start.get("config") == starts[-1].get("config"):
            return start, steady
        # A start has written all steps after its first, over those of earlier starts.
        end = min(end, start["step"])
    return {}, []


def _positive(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if 0 < record.get(name, 0) < math.inf]


def _devices(start: Mapping[str, Any]) -> tuple[int, str, dict[str, int]]:
    """Returns (number, kind, mesh axes above 1) of a start's devices, which it names as in "16 × TPU v5 lite"."""
    match = re.fullmatch(r"(\d+) × (.+)", str(start.get("devices", "")))
    mesh = start.get("mesh")
    if match and isinstance(mesh, dict) and all(isinstance(size, int) for size in mesh.values()):
        return int(match[1]), match[2], mesh
    return 0, "", {}
