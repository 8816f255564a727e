"""Show what a run will take before its machines are paid for: memory, speed, days and cost, from its compiled step.

The real compiler compiles the training step for a topology that need not be there: --topology=v5e:16x16 (the chips of
a TPU slice; --slices=N of them) or h100:16x8 (hosts × GPUs). Without --topology it plans for this machine, and compares
its estimate with measured steps. No text is read: the vocabulary is model.vocab_size, or else tokenizer.vocab_size.

--search finds the fastest mesh, number of accumulation parts (train.accumulation_steps) and remat policy on a topology,
among all that are legal. Those of these fields that are given as flags stay. It compiles at most N programs.
"""

import argparse
import json
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from data.errors import InputError
from launch.arguments import add_json, one_line
from launch.plan_text import mesh_text, plan_text
from launch.presets import add_config_arguments, load_config
from launch.program_cache import cache_folder
from train.config.config import ResolvedConfig

log = logging.getLogger("ziggurat")
# Longer steps, by the estimate, are not measured.
MAX_MEASURED_SECONDS = 60.0
MAX_COMPILED = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat plan`."""
    parser.add_argument(
        "--topology", type=one_line, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:8x8x8, h100:16x8, ... [this machine]"
    )
    parser.add_argument("--slices", metavar="N", default="1", help="TPU slices of this shape [1]")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, as in 2e12 [those of train.num_steps]")
    parser.add_argument("--price", metavar="P", help="dollars for a device-hour")
    help = f"rank meshes, parts of the batch and remat policies; compile at most N programs [{MAX_COMPILED}]"
    parser.add_argument("--search", metavar="N", nargs="?", const=str(MAX_COMPILED), help=help)
    add_json(parser)
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    tokens, price = positive("--tokens", arguments.tokens), positive("--price", arguments.price)
    check(arguments)
    config = load_config(arguments.config, arguments.overrides)
    config = config.resolved(config.tokenizer.vocab_size)
    import jax

    if arguments.topology is not None:
        # Planning for other devices leaves this machine's accelerators free for other programs.
        jax.config.update("jax_platforms", "cpu")
    from train.devices.hardware import with_usable_memory
    from train.devices.mesh import make_mesh
    from train.planning.compilation import compile_step
    from train.planning.plan import make_plan
    from train.planning.this_machine import local_chip, measured_step
    from train.planning.topology import parse_topology, topology_devices

    if arguments.topology is None:
        devices, topology = jax.devices(), "this machine"
    else:
        slices = int(arguments.slices)
        devices = topology_devices(arguments.topology, slices)
        topology = arguments.topology + (f" × {slices} slices" if slices > 1 else "")
    if arguments.search is not None:
        return search(arguments, config, devices)
    mesh = make_mesh(config, devices)
    log.info("compiling for %d × %s as %s", mesh.size, devices[0].device_kind, mesh_text(mesh.shape))
    # Python's own handler of Ctrl-C would first wait for the compiler, for minutes perhaps.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        compilation = compile_step(config, mesh, cache_folder(os.environ))
    finally:
        signal.signal(signal.SIGINT, handler)
    if arguments.topology is None:
        log.info("measuring this machine")
        chip = local_chip(config.model.compute_dtype)
    else:
        chip = with_usable_memory(parse_topology(arguments.topology)[0])
    plan = make_plan(config, mesh, chip, compilation, topology, tokens, price)
    if arguments.topology is None and plan.fits and plan.estimated_step_seconds:
        if plan.estimated_step_seconds <= MAX_MEASURED_SECONDS:
            log.info("running some steps")
            plan = replace(plan, measured_step_seconds=measured_step(config, mesh, compilation.executable))
        else:
            log.info("a step takes too long to be measured")
    print(json.dumps(asdict(plan)) if arguments.json else plan_text(plan, arguments.config))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises InputError where --slices or --search is wrong."""
    if not arguments.slices.isdecimal():
        raise InputError(f"--slices={arguments.slices}: give a whole number, at least 1")
    if arguments.slices != "1" and arguments.topology is None:
        raise InputError(f"--slices={arguments.slices} goes with --topology=CHIP:SHAPE")
    if arguments.search is not None and not (arguments.search.isdecimal() and int(arguments.search)):
        raise InputError(f"--search={arguments.search}: give a whole number of programs to compile, at least 1")
    if arguments.search is not None and arguments.topology is None:
        raise InputError("--search goes with --topology=CHIP:SHAPE; for GPUs of this machine, too, as in h100:1x8")


def positive(flag: str, text: str | None) -> float | None:
    """Returns a flag's number; raises InputError where it is not above 0."""
    if text is None:
        return None
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        example = "2e12" if flag == "--tokens" else "1.2"
        raise InputError(f"{flag}={text}: give a number above 0, as in {flag}={example}")
    return value


def search(arguments: argparse.Namespace, config: ResolvedConfig, devices: Sequence[Any]) -> int:
    """Prints a ranking of the candidates that were compiled, and the plan of the fastest."""
    from launch.plan_search import compile_best, search_text
    from train.devices.hardware import with_usable_memory
    from train.planning.search import SEARCHED, candidates
    from train.planning.topology import parse_topology

    chip = with_usable_memory(parse_topology(arguments.topology)[0])
    legal = candidates(config, devices, chip, arguments.overrides)
    log.info("%s legal ways to run the step may fit; compiling the most promising", f"{len(legal):,}")
    shared = {name: getattr(arguments, name) for name in ("config", "topology", "slices", "tokens", "price")}
    flags = [f"--{name}={value}" for name, value in shared.items() if value is not None]
    flags += [f"--config.{name}={value}" for name, value in arguments.overrides.items() if name not in SEARCHED]
    outcomes = compile_best(legal, int(arguments.search), flags)
    plans = [outcome.plan for outcome in outcomes if outcome.plan]
    if arguments.json:
        print(json.dumps({"candidates": len(legal), "plans": [asdict(plan) for plan in plans]}))
        return 0
    print(search_text(outcomes, len(legal)))
    if plans and plans[0].fits:
        print("\n" + plan_text(plans[0], arguments.config))
    return 0
