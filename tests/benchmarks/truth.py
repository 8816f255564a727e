"""Estimated steps beside measured ones.

    python -m tests.benchmarks.truth [ROW ...] [--to=FILE.jsonl]

Each row is a step that others have measured and published with its model, rows, mesh and remat policy (SOURCES); of
v5e and v5p they published FLOP/s, from which the seconds follow by the formula that they had in that year. Ours is
compiled for the same chips with the same model, rows and mesh, float32 weights and moments, bfloat16 compute, AdamW and
the remat policy that is nearest, and estimated as `ziggurat plan` does. So an error is that of the estimate and of what
the two programs do differently. Some rows are set aside to fit the model of time to; the others test it. Needs the
extras plan and plan-cuda; two to five minutes a row, kept for the next time. What is found goes to FILE at once. The
last line is one JSON object.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from launch.plan_text import mesh_text
from launch.presets import load_config
from launch.program_cache import cache_folder
from train.devices.hardware import with_usable_memory
from train.devices.mesh import make_mesh
from train.planning.compilation import compile_step
from train.planning.plan import make_plan
from train.planning.topology import parse_topology, topology_devices

# What the rows were read from; all but those of an own trainer are of MaxText.
SOURCES = {
    "v5e": "AI-Hypercomputer/maxtext, configs/v5e/README.md and 16b.sh, 32b.sh, 64b.sh (2023)",
    "v5p": "AI-Hypercomputer/maxtext, configs/v5p/README.md and 32b.sh, 64b.sh, 128b.sh (2024)",
    "recipes": "AI-Hypercomputer/tpu-recipes, training/trillium (2025): seconds of a step in their logs",
    "ironwood": "AI-Hypercomputer/tpu-recipes, training/ironwood/README.md and its recipes (2026)",
    "wiki": "vlasenkoalexey/tpu_performance_autoresearch_wiki (2026): an own JAX trainer with a profile, and MaxText",
    "toolbox": "NVIDIA/JAX-Toolbox, docs/frameworks/maxtext (2025)",
    "gpu-recipes": "AI-Hypercomputer/gpu-recipes, training/a3mega (2025)",
    "a3ultra": "AI-Hypercomputer/gpu-recipes, training/a3ultra (2025)",
    "dgxc": "NVIDIA/dgxc-benchmarking, MaxText Llama 2 and 3 (2024)",
}


@dataclass(frozen=True)
class Measured:
    """A step that somebody measured.

    Attributes:
        seconds: of a step.
        topology: of `ziggurat plan`; a slice of so many chips where the source names no shape.
        preset: the model, from which `model` differs.
        rows: of a step.
        length: positions of a row.
        mesh: devices by axis; the rest is `fsdp`.
        remat: our nearest policy.
        source: a key of SOURCES.
        fitted: whether it is set aside to fit the model of time to.
        theirs: what their program does that ours does not.
    """

    seconds: float
    topology: str
    preset: str
    rows: int
    length: int
    source: str
    model: dict[str, Any] | None = None
    mesh: dict[str, int] | None = None
    remat: str = "full"
    fitted: bool = False
    theirs: str = ""


# MaxText's default model, scaled.
WIDE_16B = {"num_layers": 32, "model_dim": 4096, "num_heads": 64, "head_dim": 128, "feedforward_dim": 28_672}
WIDE_32B = WIDE_16B | {"model_dim": 8192}
WIDE_64B = WIDE_32B | {"num_layers": 64}
WIDE_128B = WIDE_64B | {"num_heads": 128, "feedforward_dim": 57_344}
LLAMA_70B = {"num_layers": 80, "model_dim": 8192, "num_heads": 64, "num_kv_heads": 8, "feedforward_dim": 28_672}
QWEN3_8B: dict[str, Any] = {
    "num_layers": 36,
    "model_dim": 4096,
    "num_heads": 32,
    "feedforward_dim": 12_288,
    "tie_embeddings": False,
}
OFFLOADS = "keeps queries, keys, values and inputs in the host's memory"
KEEPS_LESS = "computes attention's kernel again"
# fmt: off
ROWS = {
    "16b-v5e-256": Measured(10.03, "v5e:16x16", "llama2_7b", 1536, 2048, "v5e", WIDE_16B),
    "32b-v5e-256": Measured(12.02, "v5e:16x16", "llama2_7b", 1024, 2048, "v5e", WIDE_32B, fitted=True),
    "64b-v5e-256": Measured(13.30, "v5e:16x16", "llama2_7b", 512, 2048, "v5e", WIDE_64B),
    "32b-v5p-64": Measured(7.23, "v5p:4x4x4", "llama2_7b", 384, 2048, "v5p", WIDE_32B, {"tensor": 4}, "products",
        fitted=True, theirs="measured with 448 rows, 8.44 s; " + KEEPS_LESS),
    "64b-v5p-64": Measured(7.30, "v5p:4x4x4", "llama2_7b", 192, 2048, "v5p", WIDE_64B, {"tensor": 4}, "products",
        theirs=KEEPS_LESS),
    "128b-v5p-128": Measured(4.96, "v5p:4x4x8", "llama2_7b", 128, 2048, "v5p", WIDE_128B, {"tensor": 8}, "products",
        theirs=KEEPS_LESS),
    "llama3_8b-v6e-8": Measured(3.441, "v6e:2x4", "llama3_8b", 24, 8192, "wiki", fitted=True,
        theirs="measured with 40 rows, 5.735 s"),
    "llama3_8b-v6e-8-tokamax": Measured(3.163, "v6e:2x4", "llama3_8b", 24, 8192, "wiki",
        theirs="measured with 32 rows, 4.217 s; tokamax's splash attention"),
    "llama3_8b-v6e-8-maxtext": Measured(3.443, "v6e:2x4", "llama3_8b", 24, 8192, "recipes", theirs=OFFLOADS),
    "llama3_8b-v6e-256": Measured(4.546, "v6e:16x16", "llama3_8b", 1024, 8192, "recipes", theirs=OFFLOADS),
    "llama3_70b-v6e-256": Measured(42.656, "v6e:16x16", "llama3_8b", 1280, 8192, "recipes", LLAMA_70B,
        theirs=OFFLOADS),
    "llama2_70b-v6e-256": Measured(9.052, "v6e:16x16", "llama2_7b", 512, 4096, "recipes", LLAMA_70B, fitted=True,
        theirs=OFFLOADS),
    "gpt3_175b-v6e-256": Measured(17.182, "v6e:16x16", "gpt3_175b", 768, 2048, "recipes"),
    "qwen3_8b-v6e-8": Measured(1.151, "v6e:2x4", "qwen3_0_6b", 32, 2048, "wiki", QWEN3_8B, fitted=True,
        theirs=OFFLOADS),
    "llama3_70b-tpu7x-64": Measured(12.20, "tpu7x:4x4x4", "llama3_8b", 256, 8192, "ironwood", LLAMA_70B,
        remat="attention", theirs="tokamax's splash attention"),
    "llama2_7b-h100-8": Measured(0.721, "h100:1x8", "llama2_7b", 16, 4096, "toolbox", remat="products", fitted=True),
    "llama2_7b-h100-256": Measured(1.500, "h100:32x8", "llama2_7b", 1024, 4096, "gpu-recipes", mesh={"data": 32},
        remat="products", theirs="network cards of half the speed"),
    "llama3_70b-h100-128": Measured(15.563, "h100:16x8", "llama3_8b", 256, 8192, "dgxc", LLAMA_70B, fitted=True,
        theirs="keeps queries, keys and values"),
    "llama2_70b-h100-64": Measured(6.999, "h100:8x8", "llama2_7b", 128, 4096, "dgxc", LLAMA_70B,
        remat="projections", theirs="does not say what it keeps"),
    "llama3_70b-h200-256": Measured(15.516, "h200:32x8", "llama3_8b", 512, 8192, "a3ultra", LLAMA_70B, {"data": 2},
        remat="projections"),
}
# fmt: on


def estimated(row: Measured) -> dict[str, Any]:
    """What our step of a row is estimated to take."""
    fields = {f"model.{name}": value for name, value in (row.model or {}).items()}
    fields |= {f"mesh.{axis}": size for axis, size in (row.mesh or {}).items()}
    fields |= {"train.batch_size": row.rows, "data.segment_length": row.length, "model.remat_policy": row.remat}
    if row.preset == "gpt3_175b":
        fields |= {"train.batch_ramp_start": "none", "train.batch_ramp_steps": "none"}
    config = load_config(row.preset, {name: str(value) for name, value in fields.items()})
    config = config.resolved(config.tokenizer.vocab_size)
    mesh = make_mesh(config, topology_devices(row.topology))
    chip = with_usable_memory(parse_topology(row.topology)[0])
    plan = make_plan(config, mesh, chip, compile_step(config, mesh, cache_folder(os.environ)), row.topology)
    found: dict[str, Any] = {"mesh": mesh_text(plan.mesh), "fits": plan.fits, "refused": plan.refused}
    if not plan.refused:
        found |= {"seconds": plan.estimated_step_seconds, "measured": row.seconds, "breakdown": dict(plan.breakdown)}
        found["error"] = plan.estimated_step_seconds / row.seconds - 1
    return found


def summary(errors: list[float]) -> dict[str, Any]:
    sizes = [abs(error) for error in errors]
    return {"rows": len(sizes), "median_error": statistics.median(sizes), "worst_error": max(sizes)} if sizes else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    jax.config.update("jax_platforms", "cpu")
    all_found: dict[str, dict[str, Any]] = {}
    print(f"{'row':26}{'mesh':28}{'remat':13}{'measured':>9}{'estimate':>10}{'error':>8}")
    for name in arguments.rows or ROWS:
        row, found = ROWS[name], estimated(ROWS[name])
        all_found[name] = found
        figures = f"{found['seconds']:9.2f}s{found['error']:+8.1%}" if "error" in found else f"  {found['refused']}"
        print(f"{name:26}{found['mesh']:28}{row.remat:13}{row.seconds:8.2f}s{figures}  {row.theirs}", flush=True)
        if arguments.to:
            with arguments.to.open("a") as file:
                file.write(json.dumps({"row": name, **found}) + "\n")
    halves = {
        half: summary([f["error"] for name, f in all_found.items() if "error" in f and ROWS[name].fitted == fitted])
        for half, fitted in (("fitted", True), ("held_out", False))
    }
    print(json.dumps({"jax": jax.__version__, **halves, "found": all_found}))


if __name__ == "__main__":
    main()
