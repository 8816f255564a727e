"""The plan of a training step on given devices: memory, work, traffic and time, read from its compiled program."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from model.kernels import choose_kernel
from train.config.config import ResolvedConfig
from train.devices.hardware import Chip
from train.devices.rules import training_layout
from train.planning.compilation import Compilation
from train.planning.operations import Program, total, walked
from train.planning.reader import read_program
from train.planning.speed import Bandwidth, own_seconds, reached_bandwidth, seconds_range
from train.planning.timeline import Timeline, timeline
from train.step.flops import flops_per_token
from train.step.optimizer import make_optimizer
from train.step.schedule import rows_between
from train.step.state import abstract_state
from train.step.step import abstract_batch

CYCLES = "the compiler's cycles, and attention by its products or its softmax"
ROOFLINE = "a roofline: each operation takes as long as its FLOPs or its bytes, at the speeds that programs reach"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# A note about objectives of sampled answers.
NOT_SAMPLING = "the sampling of answers and their rewards are not counted, which come before each step"


@dataclass(frozen=True)
class Plan:
    """Figures of a run before it starts; per-device figures are of one device, per-step figures of the full batch."""

    topology: str  # the topology as the user wrote it, or this machine
    device_kind: str  # JAX's name of the devices
    devices: int
    mesh: dict[str, int]  # size by mesh axis
    attention: str  # the attention kernel, and the reason for its choice
    remat_policy: str
    rows_per_step: int
    tokens_per_step: int
    fits: bool
    refused: str | None  # the compiler's message for a program that does not fit, or None
    memory_bytes_per_device: int  # memory that a program can use
    peak_bytes_per_device: int  # memory at the worst moment, or the compiler's own figure if it refused the program
    argument_bytes_per_device: int  # bytes of the state and one batch
    # Bytes of `weights`, `optimizer`, `average`, `reference`, `batch` and, at the worst moment, `temporaries`; of
    # `output` and its part `aliased` with the donated state; of the program's `code`; and in `host` memory.
    memory: dict[str, int]
    model_flops_per_device: float  # model FLOPs of a step by the formula of `train.step.flops`
    lower_seconds: float
    compile_seconds: float
    compiled_before: bool
    tokens: float
    price: float | None = None
    flops_per_device: float | None = None  # FLOPs of the program's matrix products and attention kernels in a step
    collective_bytes_per_device: int | None = None  # payload of all collectives in a step
    collectives: list[dict[str, Any]] = field(default_factory=list)  # one record for each kind, mesh axes and dtype
    compute_seconds: float | None = None  # computation in a step, by the compiler's own cycles if it has them
    estimated_step_seconds: float | None = None  # simulated time of the compiled schedule with the chip's figures
    # The least and the most seconds, by the errors of estimates of steps that others have measured; None on CPUs.
    estimated_range: tuple[float, float] | None = None
    estimated_by: str | None = None  # source of the operations' times; communication is always bytes sent / bandwidth
    estimated_mfu: float | None = None  # model FLOPs over the estimated time, as a share of the chip's peak in bfloat16
    tokens_per_second: float | None = None
    bottleneck: str | None = None  # the resource that is busy for longest
    breakdown: list[tuple[str, float]] = field(default_factory=list)  # terms of the estimate as (words, seconds)
    days: float | None = None  # days for `tokens` at the estimated speed
    device_hours: float | None = None
    cost: float | None = None  # dollars for `tokens` at `price` for a device-hour
    measured_step_seconds: float | None = None  # measured time of a step, for this machine only
    notes: list[str] = field(default_factory=list)  # sentences about parts of the program that could not be read


class Simulation(NamedTuple):
    """A compiled step as one device runs it: its operations, the bandwidth of its links, and their simulated times."""

    program: Program
    bandwidth: Bandwidth
    timeline: Timeline


def make_plan(
    config: ResolvedConfig,
    mesh: Mesh,
    chip: Chip,
    compilation: Compilation,
    topology: str,
    tokens: float | None = None,
    price: float | None = None,
    simulation: Simulation | None = None,
) -> Plan:
    """Makes the plan of a compiled step.

    Args:
        chip: figures of one device, with the memory that a program can use.
        tokens: tokens to train on; by default those of `train.num_steps`.
        price: dollars for one device-hour.
        simulation: the result of `simulate` for this step, if it is there already.
    """
    T = config.data.segment_length
    rows = config.train.batch_size
    model_flops = flops_per_token(config.model, T) * rows * T / mesh.size
    arguments = argument_bytes(config, mesh)
    peak, memory = _memory(arguments, compilation, chip.platform == "cpu")
    with jax.set_mesh(mesh):
        attention = str(choose_kernel(config.model, training_layout(config.mesh), T))
    if tokens is None:
        tokens = float(tokens_of_run(config))
    plan = Plan(
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        attention=attention,
        remat_policy=config.model.remat_policy,
        rows_per_step=rows,
        tokens_per_step=rows * T,
        fits=compilation.refused is None and peak <= chip.memory_bytes,
        refused=compilation.refused,
        memory_bytes_per_device=chip.memory_bytes,
        peak_bytes_per_device=peak,
        argument_bytes_per_device=compilation.memory.get("argument", sum(arguments.values())),
        memory=memory,
        model_flops_per_device=model_flops,
        lower_seconds=compilation.lower_seconds,
        compile_seconds=compilation.compile_seconds,
        compiled_before=compilation.cached,
        tokens=tokens,
        price=price,
        notes=[NOT_SAMPLING] if config.objective.samples else [],
    )
    if compilation.refused:
        return plan
    return _with_estimate(plan, chip, simulation or simulate(compilation.text, mesh, chip))


def simulate(text: str, mesh: Mesh, chip: Chip) -> Simulation:
    """Reads the text of a compiled program, and simulates its schedule on a mesh of chips."""
    program = read_program(text, dict(mesh.shape))
    bandwidth = reached_bandwidth(mesh, chip)
    return Simulation(program, bandwidth, timeline(program, chip, bandwidth))


def tokens_of_run(config: ResolvedConfig) -> int:
    """Returns the tokens of all `train.num_steps` steps."""
    return rows_between(config, 0, config.train.num_steps) * config.data.segment_length


def argument_bytes(config: ResolvedConfig, mesh: Mesh) -> dict[str, int]:
    """Returns the bytes per device of a step's arguments: the items of the state by name, and `batch`."""
    with jax.set_mesh(mesh):
        state = abstract_state(config, make_optimizer(config))
    arguments: dict[str, Any] = {name: tree for name, tree in state.items() if name != "step"}
    arguments["batch"] = abstract_batch(config, mesh, config.train.batch_size)

    def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
        assert x.sharding is not None
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return {name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in arguments.items()}


def _memory(arguments: Mapping[str, int], compilation: Compilation, cpu: bool) -> tuple[int, dict[str, int]]:
    """Returns (bytes at the worst moment, bytes by kind)."""
    m = compilation.memory
    if compilation.refused:
        sizes = re.findall(r"(\d[\d.]*)([KMGT])", compilation.refused)
        needed = max((float(number) * UNITS[unit] for number, unit in sizes), default=0)
        return max(int(needed), sum(arguments.values())), dict(arguments)
    # The CPU compiler's peak does not include temporaries.
    peak = max(m["peak"], m["argument"] + m["temp"] + m["output"] - m["alias"]) if cpu else m["peak"]
    return peak, {
        **arguments,
        "temporaries": max(peak - m["argument"], 0),
        "output": m["output"],
        "aliased": m["alias"],
        "code": m["generated_code"],
        "host": sum(size for name, size in m.items() if name.startswith("host_") and name != "host_generated_code"),
    }


def budget(tokens: float, speed: float, devices: int, price: float | None) -> tuple[float, float, float | None]:
    """Returns (days, device-hours, dollars if there is a price) to train on `tokens` at `speed` tokens/s."""
    seconds = tokens / speed
    hours = seconds / 3600 * devices
    return seconds / 86_400, hours, None if price is None else hours * price


def _with_estimate(plan: Plan, chip: Chip, simulation: Simulation) -> Plan:
    """Adds the figures that are read from the compiled program."""
    program, bandwidth, line = simulation
    flops = total(program.operations, "flops") + sum(kernel.flops * times for kernel, times in program.kernels.items())
    has_experts = any(kernel.is_grouped for kernel in program.kernels)
    collectives = _collectives(program, bandwidth)
    busy = {f"communication over {' × '.join(axes)}": seconds for axes, seconds in line.communication.items()}
    busy |= {"compute": line.compute, "the host's memory": line.transfer}
    tokens_per_second = plan.tokens_per_step / line.total
    days, device_hours, cost = budget(plan.tokens, tokens_per_second, plan.devices, plan.price)
    return replace(
        plan,
        flops_per_device=flops,
        collectives=collectives,
        collective_bytes_per_device=sum(c["bytes"] for c in collectives),
        compute_seconds=line.compute,
        estimated_step_seconds=line.total,
        # No measured step of experts was found.
        estimated_range=None if has_experts else seconds_range(line.total, chip),
        estimated_by=CYCLES if chip.cycles_per_second else ROOFLINE,
        estimated_mfu=plan.model_flops_per_device / chip.peak_flops / line.total,
        tokens_per_second=tokens_per_second,
        breakdown=_breakdown(plan.model_flops_per_device, program, chip, line),
        bottleneck=max(busy, key=lambda name: busy[name]),
        notes=[*plan.notes, *program.notes],
        days=days,
        device_hours=device_hours,
        cost=cost,
    )


def _collectives(program: Program, bandwidth: Bandwidth) -> list[dict[str, Any]]:
    """Sums collectives by kind, axes and dtype, the largest first; `seconds` are of the links, hidden or not."""
    totals: dict[tuple[str, tuple[str, ...], str], Counter[str]] = defaultdict(Counter)
    for c in program.collectives:
        total = totals[c.kind, c.axes, c.dtype]
        total["bytes"] += c.payload_bytes * c.count
        total["sent_bytes"] += round(c.sent_bytes * c.count)
        total["count"] += c.count
    rows = [
        {"kind": kind, "axes": list(axes), "dtype": dtype, **total, "seconds": total["sent_bytes"] / bandwidth(axes)}
        for (kind, axes, dtype), total in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def _breakdown(model_flops: float, program: Program, chip: Chip, line: Timeline) -> list[tuple[str, float]]:
    """Splits the estimate into terms that add up to it."""
    at_peak: dict[str, float] = defaultdict(float)
    below_peak: dict[str, float] = defaultdict(float)
    done_flops = 0.0
    for operation, times in walked(program.operations):
        kernel_flops = operation.kernel.flops if operation.kernel else 0.0
        if flops := operation.flops + kernel_flops:
            is_attention = operation.kernel and kernel_flops and not operation.kernel.is_grouped
            work = "attention kernels" if is_attention else "matrix products"
            least = chip.product_seconds(flops, operation.eight_bit_flops)
            done_flops += times * flops
            at_peak[work] += times * least
            below_peak[work] += times * (own_seconds(operation, chip) - least)
    done = sum(at_peak.values())
    # At the peak rates of the dtypes that the program multiplies, as it mixes them.
    useful = model_flops * done / done_flops if done_flops else model_flops / chip.peak_flops
    lost = sum(below_peak.values())
    parts = [
        ("model FLOPs at the chip's peak", useful),
        ("FLOPs beyond the model's: recomputed, masked by attention, of the optimizer", done - useful),
        *((f"{work} below the peak", seconds) for work, seconds in below_peak.items()),
        ("no matrix products: norms, softmax, optimizer, copies", line.compute - done - lost),
        *((f"waiting for communication over {' × '.join(axes)}", s) for axes, s in line.waiting.items()),
        ("waiting for copies within the device's memory", line.memory),
        ("waiting for the host's memory", line.host),
    ]
    return [(words, seconds) for words, seconds in parts if seconds]
