"""The comparison of `ziggurat plan RUN`: a run's own config, planned for the devices that it had, against its steps."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from launch.columns import columns
from launch.plan_text import mesh_text, seconds_text, size_text
from launch.presets import presets

if TYPE_CHECKING:
    from train.config.config import ResolvedConfig
    from train.planning.measured_steps import Comparison, MeasuredSteps

# A compared figure → its name in the text, and the format of its values.
FIGURES = {
    "step_seconds": ("a step", seconds_text),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "peak_bytes": ("peak memory", size_text),
}


def read_run(folder: Path) -> tuple["ResolvedConfig", "MeasuredSteps"]:
    """Returns the config of a run, and what its steps measured. Raises InputError where the folder has neither."""
    from train.planning.measured_steps import measured_steps
    from train.prepare import check_not_imported
    from train.run.folder import Run

    if not folder.exists() and str(folder) in presets():
        raise InputError(f"{folder}: there is no such folder; the preset of this name is --config={folder}")
    run, config = Run.load(folder)
    check_not_imported(run)
    return config.resolved(config.model.vocab_size), measured_steps(run, config)


def check_devices(measured: "MeasuredSteps", devices: Sequence[Any], topology: str | None) -> None:
    """Raises InputError where a topology, or this machine if that is None, does not have the run's devices."""
    from train.devices.hardware import chip_of

    kind = devices[0].device_kind
    own_chip, chip = chip_of(measured.device_kind), chip_of(kind)
    if len(devices) == measured.devices and (own_chip or measured.device_kind) == (chip or kind):
        return
    problem = f"{measured.folder} ran on {measured.devices} × {measured.device_kind}"
    if topology is not None:
        remedy = "give a topology with the run's devices"
        raise InputError(f"--topology={topology} is {len(devices)} × {kind}, but {problem}; {remedy}")
    remedy = "plan it on such a machine"
    if own_chip:
        remedy = f"give --topology={own_chip.name}:SHAPE with {measured.devices} devices"
    raise InputError(f"{problem}, but this machine has {len(devices)} × {kind}; {remedy}")


def check_mesh(measured: "MeasuredSteps", mesh: dict[str, int]) -> None:
    """Raises InputError where a plan's mesh is not that of the run."""
    if {axis: size for axis, size in mesh.items() if size > 1} != measured.mesh:
        raise InputError(
            f"{measured.folder} ran as {mesh_text(measured.mesh)}, but its config is {mesh_text(mesh)} here; "
            "give the --topology and --slices that it had"
        )


def comparison_text(measured: "MeasuredSteps", comparisons: dict[str, "Comparison"]) -> str:
    """Returns a table of a plan's figures and the run's own."""
    is_cpu = measured.device_kind == "cpu"
    rows: list[tuple[str, ...]] = [("", "planned", "measured", "planned / measured")]
    for name, (planned, value, ratio) in comparisons.items():
        title, text = FIGURES[name]
        if name == "peak_bytes" and is_cpu:
            title = "peak of a process"
        rows.append((title, text(planned), text(value), f"{ratio:.2f}"))
    processes = f" of {measured.processes} processes" if measured.processes > 1 else ""
    lines = [
        f"{measured.folder} on {measured.devices} × {measured.device_kind}{processes}, medians of {measured.steps:,} "
        "steady steps:",
        columns(rows, right=range(1, 4)),
    ]
    counted = "Python, the compiler and evaluations" if is_cpu else "evaluations"
    lines.append(f"the run waited for data for {seconds_text(measured.data_wait_seconds)} of a step")
    lines.append(f"its peak of memory counts {counted}, too")
    if is_cpu and measured.host != socket.gethostname():
        lines.append(f"the run's CPUs are of {measured.host}, the plan's of this machine")
    return "\n".join(lines)
