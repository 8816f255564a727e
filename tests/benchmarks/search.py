"""How good `ziggurat plan --search` is: its estimates beside compiled programs, and its best beside the best of all.

    python -m tests.benchmarks.search [CASE ...] [--programs=N] [--exhaustive] [--to=FILE.jsonl]

Of each case, a model on a topology, it compiles N candidates, drawn at random from all that may fit, and prints
estimated / compiled: the peak of memory, and the seconds of a step as `plan` estimates them from the program. What may
err is that ratio's spread (`train.planning.search` has the limits that are assumed). --exhaustive compiles every
candidate of a small model on v5e:2x2 instead, and compares the search's choice. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from launch.plan_search import candidate_text
from launch.presets import load_config
from launch.program_cache import cache_folder
from train.config.config import Config
from train.devices.hardware import Chip, with_usable_memory
from train.devices.mesh import make_mesh
from train.planning.compilation import compile_step
from train.planning.plan import Plan, make_plan
from train.planning.search import Candidate, candidates, worth_compiling
from train.planning.topology import parse_topology, topology_devices

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama3_8b-v6e-16": ("llama3_8b", "v6e:4x4", {"train.batch_size": 256}),
    "llama2_7b-v5e-32": ("llama2_7b", "v5e:4x8", {"train.batch_size": 256}),
    "llama3_8b-v5p-16": ("llama3_8b", "v5p:2x2x4", {"train.batch_size": 256}),
    "llama2_7b-h100-16": ("llama2_7b", "h100:2x8", {"train.batch_size": 256}),
}
SMALL = {
    "model.num_layers": 4, "model.model_dim": 512, "model.num_heads": 8, "model.feedforward_dim": 1408,
    "model.vocab_size": 8192, "model.compute_dtype": "bfloat16", "data.segment_length": 1024, "train.batch_size": 16,
    "mesh.context": 1, "train.accumulation_steps": 1,
}  # fmt: skip


def prepared(
    preset: str, topology: str, overrides: dict[str, Any]
) -> tuple[dict[str, str], list[Candidate], Chip, Any]:
    """(overrides as text, candidates, chip, devices) of a case."""
    texts = {name: str(value) for name, value in overrides.items()}
    devices, chip = topology_devices(topology), with_usable_memory(parse_topology(topology)[0])
    return texts, candidates(resolved(preset, texts), devices, chip, texts), chip, devices


def resolved(preset: str, texts: dict[str, str]) -> Config:
    """The config of a preset with overrides."""
    config = load_config(preset, texts)
    return config.resolved(config.tokenizer.vocab_size)


def compiled(preset: str, topology: str, texts: dict[str, str], candidate: Candidate, chip: Chip, devices: Any) -> Plan:
    """The plan of a candidate."""
    config = resolved(preset, texts | candidate.changes)
    mesh = make_mesh(config, devices)
    return make_plan(config, mesh, chip, compile_step(config, mesh, cache_folder(os.environ)), topology)


def errors(name: str, programs: int, seed: int, to: Path | None) -> dict[str, Any]:
    """Estimated / compiled of randomly drawn candidates of a case."""
    preset, topology, overrides = CASES[name]
    texts, found, chip, devices = prepared(preset, topology, overrides)
    ratios: dict[str, list[float]] = {"peak": [], "seconds": []}
    for candidate in random.Random(seed).sample(found, programs):
        plan, estimate = compiled(preset, topology, texts, candidate, chip, devices), candidate.estimate
        line: dict[str, Any] = {"case": name, "candidate": candidate_text(candidate), "estimate": estimate._asdict()}
        ratios["peak"].append(estimate.peak_bytes / plan.peak_bytes_per_device)
        line["peak"] = plan.peak_bytes_per_device
        if plan.estimated_step_seconds:
            ratios["seconds"].append(estimate.step_seconds / plan.estimated_step_seconds)
            line |= {"seconds": plan.estimated_step_seconds, "breakdown": plan.breakdown}
        shown = "  ".join(f"{what} {ratio[-1]:.2f}" for what, ratio in ratios.items() if ratio)
        print(f"{name}  {candidate_text(candidate):<60}  {shown}", flush=True)
        if to:
            with to.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return {what: spread(ratio) for what, ratio in ratios.items() if ratio}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {"least": min(ratios), "median": statistics.median(ratios), "greatest": max(ratios), "programs": len(ratios)}


def exhaustive() -> dict[str, Any]:
    """Every candidate of a small model compiled, and what the search would have compiled of them."""
    texts, found, chip, devices = prepared("tiny", "v5e:2x2", SMALL)
    seconds = []
    for candidate in found:
        plan = compiled("tiny", "v5e:2x2", texts, candidate, chip, devices)
        seconds.append(plan.estimated_step_seconds if plan.fits and plan.estimated_step_seconds else float("inf"))
        ratio = candidate.estimate.step_seconds / seconds[-1]
        print(f"{candidate_text(candidate):<60}  {seconds[-1] * 1e3:.2f} ms  estimate × {ratio:.2f}", flush=True)
    tried: list[tuple[Candidate, float]] = []
    for candidate, of_candidate in zip(found, seconds, strict=True):
        if worth_compiling(candidate, tried):
            tried.append((candidate, of_candidate))
    best_of_search = min(seconds for _, seconds in tried)
    return {
        "candidates": len(found),
        "compiled_by_search": len(tried),
        "best": min(seconds),
        "by_search": best_of_search,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--programs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {"jax": jax.__version__}
    if arguments.exhaustive:
        found["exhaustive"] = exhaustive()
    for name in arguments.cases or ([] if arguments.exhaustive else CASES):
        found[name] = errors(name, arguments.programs, arguments.seed, arguments.to)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
