"""The training step, compiled for large machines that are not here, beside MaxText's for the same shapes.

    python -m tests.benchmarks.plan [ROW ...] [--better] [--to=FILE.jsonl]

Needs the extras plan and plan-cuda; half a minute to three minutes a row. MaxText's figures are of its own
`train_compile` (MaxText 0.2.5, jax 0.12.0.1, splash or cuDNN attention, float32 parameters and moments, bfloat16
compute, AdamW, scanned layers), whose programs were read as ours are here: products, those of experts included, loops
weighed by their trips. They are for its rows, remat policy and shards. --better adds other ways to run the same step.
What is read of each row goes to FILE at once. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from launch.plan_text import mesh_text
from launch.presets import load_config
from launch.program_cache import cache_folder
from train.config.config import ResolvedConfig
from train.devices.hardware import with_usable_memory
from train.devices.mesh import make_mesh
from train.planning.compilation import compile_step
from train.planning.operations import Program, total
from train.planning.plan import make_plan
from train.planning.reader import read_program
from train.planning.topology import parse_topology, topology_devices

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A step, and what MaxText's comes to for a device: GiB, FLOPs, GiB, the compiler's seconds where known.

    Attributes:
        topology: of `ziggurat plan`.
        preset: the model.
        overrides: mesh, remat policy, rows and length.
        maxtext: "peak", "flops", "traffic", "compute".
        better: whether the mesh or the remat policy is another than MaxText's row has.
    """

    topology: str
    preset: str
    overrides: dict[str, Any]
    maxtext: dict[str, float] = field(default_factory=dict)
    better: bool = False


def sized(rows: int, length: int, **more: Any) -> dict[str, Any]:
    """Overrides: rows of a step, positions of a row."""
    return {"train.batch_size": rows, "data.segment_length": length} | more


def gpt3(**mesh: int) -> dict[str, Any]:
    """Overrides of GPT-3: a row a device, the batch of a step without a ramp."""
    mesh_fields = {f"mesh.{axis}": size for axis, size in mesh.items()}
    return {"train.batch_size": 512, "train.batch_ramp_start": "none", "train.batch_ramp_steps": "none"} | mesh_fields


# fmt: off
ROWS = {
    "llama2_7b-v6e-16": Row("v6e:4x4", "llama2_7b", sized(16, 4096),
        {"peak": 8.99, "flops": 2.04e14, "traffic": 38.3, "compute": 11.17e8 / 1.75e9}),
    "llama2_7b-v5e-256": Row("v5e:16x16", "llama2_7b", sized(512, 2048),
        {"peak": 2.63, "flops": 2.04e14, "traffic": 36.7, "compute": 1.46}),
    "llama2_7b-v6e-256": Row("v6e:16x16", "llama2_7b", sized(1024, 4096),
        {"peak": 8.29, "flops": 8.14e14, "traffic": 36.7}),
    "llama2_7b-v5p-64": Row("v5p:4x4x4", "llama2_7b", sized(256, 2048) | {"model.remat_policy": "products"},
        {"peak": 23.83, "flops": 3.25e14, "traffic": 36.7, "compute": 1.12}),
    "gpt3_175b-v5p-512-tensor8": Row("v5p:8x8x8", "gpt3_175b", gpt3(tensor=8),
        {"peak": 12.23, "flops": 2.63e15, "traffic": 715, "compute": 7.84}),
    "gpt3_175b-v5p-512": Row("v5p:8x8x8", "gpt3_175b", gpt3(),
        {"peak": 15.71, "flops": 2.63e15, "traffic": 977, "compute": 7.08}),
    "llama2_7b-h100-8": Row("h100:1x8", "llama2_7b", sized(8, 2048),
        {"peak": 16.70, "flops": 1.02e14, "traffic": 36.7}),
    "llama2_7b-h100-128": Row("h100:16x8", "llama2_7b", sized(128, 2048),
        {"peak": 2.22, "flops": 1.02e14, "traffic": 36.7}),
    "gpt3_175b-h100-512": Row("h100:64x8", "gpt3_175b", gpt3(tensor=8),
        {"peak": 13.47, "flops": 2.63e15, "traffic": 665}),
    # Mixtures of experts; MaxText's with its sparse products and megablox.
    "mixtral_8x7b-v5p-64": Row("v5p:4x4x4", "mixtral_8x7b", sized(256, 4096),
        {"peak": 23.51, "flops": 1.668e15, "traffic": 262.7, "compute": 1.776}),
    "mixtral_8x7b-v6e-256": Row("v6e:16x16", "mixtral_8x7b", sized(3072, 4096),
        {"peak": 29.36, "flops": 5.06e15, "traffic": 319.0, "compute": 7.183}),
    "qwen3_30b_a3b-v5p-64": Row("v5p:4x4x4", "qwen3_30b_a3b", sized(256, 4096),
        {"peak": 19.12, "flops": 3.885e14, "traffic": 170.1, "compute": 1.486}),
    "qwen3_30b_a3b-v5p-64-expert4": Row("v5p:4x4x4", "qwen3_30b_a3b", sized(256, 4096) | {"mesh.expert": 4},
        better=True),
    "qwen3_30b_a3b-v5p-64-products": Row("v5p:4x4x4", "qwen3_30b_a3b",
        sized(256, 4096) | {"model.remat_policy": "products"}, better=True),
    "mixtral_8x7b-v5p-64-products": Row("v5p:4x4x4", "mixtral_8x7b",
        sized(256, 4096) | {"model.remat_policy": "products"}, better=True),
    "qwen3_30b_a3b-v6e-256": Row("v6e:16x16", "qwen3_30b_a3b", sized(3072, 4096),
        {"peak": 25.47, "flops": 1.165e15, "traffic": 170.4, "compute": 5.113}),
    "mixtral_8x7b-h100-64": Row("h100:8x8", "mixtral_8x7b", sized(128, 4096)),
    "qwen3_30b_a3b-h100-64": Row("h100:8x8", "qwen3_30b_a3b", sized(128, 4096)),
}
# fmt: on
UNITS = {"peak": "GiB", "flops": "FLOPs", "traffic": "GiB", "compute": "s"}


def figures_of(row: Row) -> dict[str, Any]:
    """What a row's compiled step comes to."""
    config = load_config(row.preset, {name: str(value) for name, value in row.overrides.items()})
    config = config.resolved(config.tokenizer.vocab_size)
    mesh = make_mesh(config, topology_devices(row.topology))
    chip = with_usable_memory(parse_topology(row.topology)[0])
    start = time.perf_counter()
    compilation = compile_step(config, mesh, cache_folder(os.environ))
    plan = make_plan(config, mesh, chip, compilation, row.topology)
    found: dict[str, Any] = {
        "mesh": mesh_text(plan.mesh), "remat": plan.remat_policy, "fits": plan.fits,
        "peak": plan.peak_bytes_per_device / GIB, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    if not plan.refused:
        program = read_program(compilation.text, dict(mesh.shape))
        found |= {
            "flops": total(program.operations, "flops") + of_experts(config, program, mesh.size),
            "traffic": sum(c.payload_bytes * c.count for c in program.collectives) / GIB,
            "sent": sum(c.sent_bytes * c.count for c in program.collectives) / GIB,
            "compute": total(program.operations, "cycles") / chip.cycles_per_second if chip.cycles_per_second else None,
            "step_seconds": plan.estimated_step_seconds,
            "mfu": plan.estimated_mfu,
            "attention": plan.attention.partition(":")[0],
        }
    return found


def of_experts(config: ResolvedConfig, program: Program, devices: int) -> float:
    """FLOPs of the chosen experts alone: neither our kernels nor MaxText's state those of a tile's other rows."""
    rows = config.train.batch_size * config.data.segment_length * config.model.experts_per_token / devices
    return sum(rows * kernel.flops_of_row * times for kernel, times in program.kernels.items() if kernel.is_grouped)


def shown(name: str, found: dict[str, Any], row: Row) -> str:
    """A line a figure: ours, MaxText's and the ratio."""
    step = found.get("step_seconds") or math.nan
    lines = [f"{name}: {found['mesh']}, {found['remat']}; {step:.2f} s, MFU {found.get('mfu') or math.nan:.1%}"]
    for what, unit in UNITS.items():
        ours, theirs = found.get(what), row.maxtext.get(what)
        if ours is not None:
            digits = ".3g" if what == "flops" else ".2f"
            beside = f"{theirs:>10{digits}} MaxText  {ours / theirs:.3f} ×" if theirs else ""
            lines.append(f"  {what:<8}{ours:>10{digits}} {unit:<6}{beside}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--better", action="store_true")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    jax.config.update("jax_platforms", "cpu")
    all_found = {}
    for name in arguments.rows or [name for name, row in ROWS.items() if arguments.better or not row.better]:
        row = ROWS[name]
        found = all_found[name] = figures_of(row)
        found["ratios"] = {what: found[what] / theirs for what, theirs in row.maxtext.items() if found.get(what)}
        print(shown(name, found, row), flush=True)
        if arguments.to:
            with arguments.to.open("a") as file:
                file.write(json.dumps({"row": name, **found}) + "\n")
    worst = {
        what: max((found["ratios"][what] for found in all_found.values() if what in found["ratios"]), default=None)
        for what in UNITS
    }
    print(json.dumps({"jax": jax.__version__, "rows": all_found, "worst_ratio": worst}))


if __name__ == "__main__":
    main()
