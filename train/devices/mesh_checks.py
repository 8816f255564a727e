"""Checks of a mesh against a config."""

import math
from collections.abc import Mapping
from functools import partial
from itertools import combinations

from model.config import ResolvedModelConfig
from model.parameters import parameter_table
from model.sharding import Layout, as_tuple
from train.config.config import ResolvedConfig
from train.config.reading import divisors
from train.config.run_config import MeshConfig
from train.devices.hardware import chip_of
from train.devices.rules import ACTIVATIONS, AXES, DEFAULT_RULES, training_layout


def rule_problems(config: MeshConfig) -> list[str]:
    """Returns the errors of `mesh.rules`: unknown names, and mesh axes that two axes of one array would share."""
    problems = []
    for axis, mesh in config.rules.items():
        if axis not in DEFAULT_RULES:
            problems.append(f"mesh.rules: there is no logical axis {axis!r}; there are {', '.join(DEFAULT_RULES)}")
        if not isinstance(mesh, list | tuple) or not all(isinstance(name, str) for name in mesh):
            problems.append(f'mesh.rules.{axis} is {mesh!r}; it must be a list of mesh axes, as in ["fsdp"]')
            continue
        for name in mesh:
            if name not in AXES:
                problems.append(f"mesh.rules.{axis}: there is no mesh axis {name!r}; there are {', '.join(AXES)}")
    if problems:
        return problems
    layout = training_layout(config)
    for axes in ACTIVATIONS:
        names = [name for axis in axes for name in as_tuple(layout.rules[axis])]
        for name in sorted({name for name in names if names.count(name) > 1}):
            sharing = " and ".join(f"{axis!r}" for axis in axes if name in layout.mesh_axes(axis))
            problems.append(f"mesh.rules: {sharing} of one array are both shared by {name!r}; take it from one of them")
    for axis, parts in layout.rules.items():
        for name in sorted({name for name in as_tuple(parts) if as_tuple(parts).count(name) > 1}):
            problems.append(f"mesh.rules.{axis}: {name!r} is listed twice")
    for axis in ("heads", "kv_heads", "feedforward", "vocabulary"):
        for name in sorted(layout.mesh_axes(axis) & layout.mesh_axes("model")):
            problems.append(f"mesh.rules: {axis!r} and 'model' of one weight are both shared by {name!r}")
    if layout.rules["heads"] != layout.rules["kv_heads"]:
        problems.append(
            "mesh.rules: 'heads' and 'kv_heads' must be shared by the same mesh axes: queries meet their keys"
        )
    inside = as_tuple(layout.rules["time"])
    between = as_tuple(layout.rules["sequence"])
    if between[: len(inside)] != inside:
        problems.append("mesh.rules: 'sequence' must begin with the mesh axes of 'time', and may continue with others")
    return problems


def mesh_problems(config: ResolvedConfig, shape: tuple[int, ...]) -> list[str]:
    """Returns what cannot be sharded over a mesh, one line each with the field, the axis and sizes that work."""
    size = dict(zip(AXES, shape, strict=True))
    layout = training_layout(config.mesh)
    rows = config.train.batch_size // config.train.accumulation_steps
    must_divide = partial(divisibility_problems, layout, size)
    problems = must_divide("train.batch_size / train.accumulation_steps", rows, "batch")
    if config.train.batch_ramp_start:
        # Later stages are multiples of this batch; their microbatches are multiples of this one or of the full batch's.
        problems += must_divide("train.batch_ramp_start", config.train.batch_ramp_start, "batch")
    problems += must_divide("data.num_streams", config.num_streams, "batch")
    if config.model.num_experts:
        problems += expert_problems(layout, size)
    elif size["expert"] > 1:
        problems.append(f"mesh.expert = {size['expert']} is for experts; use mesh.fsdp, or give model.num_experts")
    problems += must_divide("data.segment_length", config.data.segment_length, "sequence")
    if any(size[mesh] > 1 for mesh in layout.mesh_axes("time")):
        # Each device takes a piece from both ends of a row: see `model.context_parallel`.
        problems += must_divide("data.segment_length", config.data.segment_length, "time", pieces=2)
    return problems + weight_problems(config.model, layout, size)


def expert_problems(layout: Layout, size: Mapping[str, int]) -> list[str]:
    """Returns the errors of `mesh.rules` for experts, over mesh axes of these sizes."""
    problems = []
    for one, other in combinations(("experts", "expert_model", "feedforward"), 2):
        for name in sorted(layout.mesh_axes(one) & layout.mesh_axes(other)):
            problems.append(f"mesh.rules: {one!r} and {other!r} of one weight are both shared by {name!r}")
    # Tokens are gathered from the devices that share experts, so these must have different rows.
    for name in sorted(layout.mesh_axes("experts") - layout.mesh_axes("batch")):
        if size[name] > 1:
            problems.append(f"mesh.rules: 'experts' are shared by {name!r}, so 'batch' must be shared by it, too")
    return problems


def weight_problems(config: ResolvedModelConfig, layout: Layout, size: Mapping[str, int]) -> list[str]:
    """Returns the problems of the model's weights alone, over mesh axes of these sizes."""
    widths = ("feedforward_dim", "expert_dim", "shared_expert_dim")
    fields = {
        "model": ("model_dim",),
        "heads": ("num_heads",),
        "kv_heads": ("num_kv_heads",),
        "feedforward": widths,
        "experts": ("num_experts",),
        "expert_model": ("model_dim",),
    }
    problems = []
    for axis, number in dict.fromkeys(item for p in parameter_table(config).values() for item in p.axes.items()):
        if layout.mesh_axes(axis):
            other = "num_kv_heads × model.head_dim" if axis == "model" else axis
            name = next((field for field in fields.get(axis, ()) if getattr(config, field) == number), other)
            name = f"model.{name}" + (" (padded)" if axis == "vocabulary" else "")
            problems += divisibility_problems(layout, size, name, number, axis)
    return problems


def divisibility_problems(
    layout: Layout, size: Mapping[str, int], name: str, number: int, axis: str, pieces: int = 1
) -> list[str]:
    """Returns a line if the mesh axes of a logical axis, times `pieces`, do not divide a number."""
    names = [mesh for mesh in AXES if mesh in layout.mesh_axes(axis)]
    by = math.prod(size[mesh] for mesh in names) * pieces
    if number % by == 0:
        return []
    works = [d for d in divisors(number) if d * pieces <= by and number % (d * pieces) == 0]
    # The devices report the number of slices; its field has another name.
    shown = " × ".join(f"mesh.{mesh}" + ("s" if mesh == "slice" else "") for mesh in names
                       if size[mesh] > 1) or f"mesh.{names[0]}"  # fmt: skip
    most = f"; nearest size that works: {works[-1]}" if works else ""
    times = f" in {pieces} pieces each" if pieces > 1 else ""
    return [f"{name} = {number} cannot be shared by {shown} = {by // pieces}{times}{most}"]


def matmul_problems(config: ResolvedModelConfig, device_kind: str) -> list[str]:
    """Returns a line if a chip with figures does not multiply `model.matmul_dtype` faster than bfloat16."""
    chip = chip_of(device_kind)
    if config.matmul_dtype is None or chip is None or config.matmul_dtype in chip.matmul_dtypes:
        return []
    instead = f"give {' or '.join(chip.matmul_dtypes)}, or " if chip.matmul_dtypes else ""
    return [
        f"model.matmul_dtype = {config.matmul_dtype}: {device_kind} does not multiply it faster than bfloat16; "
        f"{instead}leave it at none"
    ]
