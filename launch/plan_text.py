"""A plan as text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.planning.plan import Plan

MORE_OF_A_GPU = "; JAX takes three quarters of a GPU's memory, XLA_CLIENT_MEM_FRACTION=0.9 lets it take more"
MEMORY = {
    "weights": "weights",
    "optimizer": "the optimizer's state",
    "average": "moving average of the weights",
    "batch": "batch",
    "temporaries": "temporaries: activations, gradients, gathered weights",
    "output": "result",
    "aliased": "of it in the memory of the state that was given",
    "code": "the program itself",
    "host": "in the host's memory",
}
MORE_MEMORY = (
    "give more devices, a smaller train.batch_size, more train.accumulation_steps, model.remat_policy=full or offload, "
    "or share more over mesh.fsdp and mesh.tensor"
)


def mesh_text(shape: Mapping[str, int]) -> str:
    """Axes that share anything, as in "fsdp 64 × tensor 8"."""
    return " × ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def plan_text(plan: "Plan", name: str) -> str:
    """A plan as lines."""
    p = plan
    memory = f"{size_text(p.peak_bytes_per_device)} of {size_text(p.memory_bytes_per_device)} a device"
    lines = [
        f"{name} on {p.topology}: {p.devices} × {p.device_kind} as {mesh_text(p.mesh)}",
        f"a step       {p.rows_per_step:,} rows, {p.tokens_per_step:,} tokens",
        f"attention    {p.attention}; remat: {p.remat_policy}",
        f"memory       {memory}: {'fits' if p.fits else 'DOES NOT FIT'}",
        *(f"{size_text(size):>14}  {MEMORY[what]}" for what, size in p.memory.items() if size),
    ]
    if p.refused:
        lines.append(f"  the compiler says: {p.refused}")
    if not p.fits:
        lines.append(f"  {MORE_MEMORY}" + (MORE_OF_A_GPU if p.device_kind.startswith("NVIDIA") else ""))
    lines.append(f"FLOPs        {p.model_flops_per_device:.3g} a device by the model's formula")
    if p.estimated_step_seconds is None:
        return "\n".join(lines)
    assert p.flops_per_device
    assert p.estimated_mfu
    lines[-1] += f", {p.flops_per_device:.3g} in the program ({p.flops_per_device / p.model_flops_per_device:.2f} ×)"
    return "\n".join([*lines, *traffic_lines(plan), *time_lines(plan)])


def traffic_lines(plan: "Plan") -> list[str]:
    """What the devices send each other."""
    if not plan.collectives:
        return ["collectives  none"]
    assert plan.collective_bytes_per_device
    lines = [f"collectives  {size_text(plan.collective_bytes_per_device)} a device"]
    least = plan.collective_bytes_per_device / 1000
    for c in plan.collectives:
        if c["bytes"] >= least:
            over = " × ".join(c["axes"])
            lines.append(f"{size_text(c['bytes']):>14}  {c['kind']} over {over}, {c['dtype']}, {c['count']:,} times")
    small = [c["bytes"] for c in plan.collectives if c["bytes"] < least]
    return [*lines, f"{size_text(sum(small)):>14}  {len(small)} smaller kinds"] if small else lines


def time_lines(plan: "Plan") -> list[str]:
    """How long a step and the run take, and why."""
    from train.run.goodput import duration

    p, step = plan, plan.estimated_step_seconds
    assert step
    assert p.days
    unit, digits = (1.0, "s ") if step >= 1 else (1e3, "ms")
    shown = [(what, seconds) for what, seconds in p.breakdown if abs(seconds) >= step / 1000]
    lines = [
        f"step         {seconds_text(step)} estimated, {p.estimated_mfu:.1%} MFU, {p.tokens_per_second:,.0f} tokens/s; "
        f"bottleneck: {p.bottleneck}",
        *(f"{seconds * unit:>11.2f} {digits} {seconds / step:>4.0%}  {what}" for what, seconds in shown),
        f"  estimated by {p.estimated_by}",
    ]
    if p.measured_step_seconds:
        error = step / p.measured_step_seconds - 1
        lines.append(f"  measured here: {seconds_text(p.measured_step_seconds)}; the estimate is off by {error:+.0%}")
    lines += [f"  {note}" for note in p.notes]
    time = f"{p.days:,.1f} days" if p.days >= 2 else duration(p.days * 86_400)
    cost = "" if p.cost is None else f", ${p.cost:,.0f} at ${p.price:g} each"
    lines.append(f"{p.tokens:.3g} tokens  {time}, {p.device_hours:,.1f} device-hours{cost}")
    how = "compiled before, in" if p.compiled_before else "compiled in"
    lines.append(f"{how} {p.compile_seconds:.1f} s, lowered in {p.lower_seconds:.1f} s")
    return lines


def size_text(size: float) -> str:
    """Bytes as in 4.13 GiB or 0.52 MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.2f} MiB"


def seconds_text(seconds: float) -> str:
    """As in 1.23 s or 45.6 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
