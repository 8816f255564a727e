"""The text of a plan."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.run.goodput import duration

if TYPE_CHECKING:
    from train.planning.plan import Plan

# Part of a device's memory → its name in the text.
MEMORY = {
    "weights": "weights",
    "optimizer": "the optimizer's state",
    "average": "moving average of the weights",
    "reference": "reference of the objective",
    "batch": "batch",
    "temporaries": "temporaries: activations, gradients, gathered weights",
    "output": "result",
    "aliased": "of the result, in the memory of the previous state",
    "code": "the program itself",
    "host": "in the host's memory",
}
HOW_TO_FIT = (
    "give more devices, a smaller train.batch_size, more train.accumulation_steps, model.remat_policy=full or offload, "
    "or share more over mesh.fsdp and mesh.tensor"
)
HOW_TO_FIT_A_GPU = "; JAX takes three quarters of a GPU's memory, XLA_CLIENT_MEM_FRACTION=0.9 lets it take more"


def mesh_text(shape: Mapping[str, int]) -> str:
    """Returns the axes that share anything, as in "fsdp 64 × tensor 8"."""
    return " × ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def plan_text(plan: "Plan", name: str) -> str:
    """Returns the whole plan; `name` is that of its config."""
    memory = f"{size_text(plan.peak_bytes_per_device)} of {size_text(plan.memory_bytes_per_device)} a device"
    lines = [
        f"{name} on {plan.topology}: {plan.devices} × {plan.device_kind} as {mesh_text(plan.mesh)}",
        f"a step       {plan.rows_per_step:,} rows, {plan.tokens_per_step:,} tokens",
        f"attention    {plan.attention}; remat: {plan.remat_policy}",
        f"memory       {memory}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        *(f"{size_text(size):>14}  {MEMORY[part]}" for part, size in plan.memory.items() if size),
    ]
    if plan.refused:
        lines.append(f"  the compiler says: {plan.refused}")
    if not plan.fits:
        lines.append(f"  {HOW_TO_FIT}" + (HOW_TO_FIT_A_GPU if plan.device_kind.startswith("NVIDIA") else ""))
    flops = f"FLOPs        {plan.model_flops_per_device:.3g} a device by the model's formula"
    if plan.estimated_step_seconds is None:
        return "\n".join([*lines, flops])
    assert plan.flops_per_device
    ratio = plan.flops_per_device / plan.model_flops_per_device
    flops += f", {plan.flops_per_device:.3g} in the program ({ratio:.2f} ×)"
    return "\n".join([*lines, flops, *traffic_lines(plan), *time_lines(plan)])


def traffic_lines(plan: "Plan") -> list[str]:
    """Returns lines about the collectives; kinds with less than a thousandth of all bytes share one line."""
    if not plan.collectives:
        return ["collectives  none"]
    assert plan.collective_bytes_per_device
    lines = [f"collectives  {size_text(plan.collective_bytes_per_device)} a device"]
    least = plan.collective_bytes_per_device / 1000
    for c in plan.collectives:
        if c["bytes"] >= least:
            axes = " × ".join(c["axes"])
            lines.append(f"{size_text(c['bytes']):>14}  {c['kind']} over {axes}, {c['dtype']}, {c['count']:,} times")
    if small := [c["bytes"] for c in plan.collectives if c["bytes"] < least]:
        lines.append(f"{size_text(sum(small)):>14}  {len(small)} smaller kinds")
    return lines


def time_lines(plan: "Plan") -> list[str]:
    """Returns lines about the time of a step and of the run, and what it is made of."""
    step = plan.estimated_step_seconds
    assert step
    assert plan.days
    unit, digits = (1.0, "s ") if step >= 1 else (1e3, "ms")
    lines = [
        f"step         {seconds_text(step)}{_range_text(plan)}, {plan.estimated_mfu:.1%} MFU, "
        f"{plan.tokens_per_second:,.0f} tokens/s; bottleneck: {plan.bottleneck}"
    ]
    for part, seconds in plan.breakdown:
        if abs(seconds) >= step / 1000:
            lines.append(f"{seconds * unit:>11.2f} {digits} {seconds / step:>4.0%}  {part}")
    lines.append(f"  estimated by {plan.estimated_by}")
    if plan.measured_step_seconds:
        error = step / plan.measured_step_seconds - 1
        measured = seconds_text(plan.measured_step_seconds)
        lines.append(f"  measured here: {measured}; the estimate is off by {error:+.0%}")
    lines += [f"  {note}" for note in plan.notes]
    time = days_text(plan.days)
    cost = "" if plan.cost is None else f", ${plan.cost:,.0f} at ${plan.price:g} each"
    lines.append(f"{plan.tokens:.3g} tokens  {time}, {plan.device_hours:,.1f} device-hours{cost}")
    compiled = "compiled before, in" if plan.compiled_before else "compiled in"
    lines.append(f"{compiled} {plan.compile_seconds:.1f} s, lowered in {plan.lower_seconds:.1f} s")
    return lines


def _range_text(plan: "Plan") -> str:
    if not plan.estimated_range:
        return " estimated"
    least, most = map(seconds_text, plan.estimated_range)
    return f" estimated ({least} to {most})"


def size_text(size: float) -> str:
    """Returns bytes as in 4.13 GiB or 0.52 MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.2f} MiB"


def days_text(days: float) -> str:
    """Returns days as in 38.9 days or 1 h 53 min."""
    return f"{days:,.1f} days" if days >= 2 else duration(days * 86_400)


def seconds_text(seconds: float) -> str:
    """Returns seconds as in 1.23 s or 45.6 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
