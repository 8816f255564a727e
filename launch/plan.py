"""Show what a run will take before its machines are paid for: memory, speed, days and cost, from its compiled step.

The real compiler compiles the training step for a topology that need not be there: --topology=v5e:16x16 (the chips of
a TPU slice; --slices=N of them) or h100:16x8 (hosts × GPUs). Without --topology it plans for this machine, and compares
its estimate with measured steps. No text is read: the vocabulary is model.vocab_size, or else tokenizer.vocab_size.

With a RUN it plans the run's own config for the devices that the run had, and compares the plan with its logged steps.
--html also writes a page: memory, the time of a step, the compiled schedule as a timeline, and a roofline.

--search finds the fastest mesh, number of accumulation parts (train.accumulation_steps) and remat policy on a topology,
among all that are legal. Those of these fields that are given as flags stay. It compiles at most N programs, by default
those that it can start in six minutes. The batch size affects learning, so it searches only the sizes that
--batch-sizes asks for, and compares them by the same tokens.
"""

import argparse
import json
import logging
import math
import os
import re
import signal
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from launch.arguments import add_json, check_output, one_line, path
from launch.plan_run import check_devices, check_mesh, comparison_text, read_run
from launch.plan_text import mesh_text, plan_text
from launch.presets import add_config_arguments, load_config
from launch.program_cache import cache_folder
from train.config.config import ResolvedConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from train.devices.hardware import Chip
    from train.planning.compilation import Compilation
    from train.planning.plan import Plan
    from train.planning.search import Candidate

log = logging.getLogger("ziggurat")
# Longer steps, by the estimate, are not measured.
MAX_MEASURED_SECONDS = 60.0
MAX_COMPILED = 6
BATCH = "train.batch_size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat plan`."""
    parser.add_argument(
        "run_folder", metavar="RUN", type=path, nargs="?", help="a run's folder, to compare its steps; or give --config"
    )
    parser.add_argument(
        "--topology", type=one_line, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:8x8x8, h100:16x8, ... [this machine]"
    )
    parser.add_argument("--slices", metavar="N", default="1", help="TPU slices of this shape [1]")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on, as in 2e12 [those of train.num_steps]")
    parser.add_argument("--price", metavar="P", help="dollars for a device-hour")
    help = f"rank meshes, parts of the batch and remat policies; compile N programs [{MAX_COMPILED}, while time allows]"
    parser.add_argument("--search", metavar="N", nargs="?", const="", help=help)
    help = "with --search: rows of a step, as in 256,512,1024 [train.batch_size alone]"
    parser.add_argument("--batch-sizes", metavar="B,...", help=help)
    parser.add_argument("--html", metavar="FILE", type=path, help="write the plan as one HTML page, too")
    add_json(parser)
    add_config_arguments(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    tokens, price = positive("--tokens", arguments.tokens), positive("--price", arguments.price)
    check(arguments)
    measured = None
    if arguments.run_folder is not None:
        config, measured = read_run(arguments.run_folder)
    else:
        written = load_config(arguments.config, arguments.overrides)
        config = written.resolved(written.tokenizer.vocab_size)
    devices, topology = find_devices(arguments)
    if arguments.search is not None:
        return search(arguments, config, devices)
    from train.devices.mesh import make_mesh
    from train.planning.measured_steps import compare
    from train.planning.plan import make_plan, simulate

    if measured:
        check_devices(measured, devices, arguments.topology)
    mesh = make_mesh(config, devices)
    if measured:
        check_mesh(measured, dict(mesh.shape))
    compilation = compiled(config, mesh)
    chip = find_chip(arguments.topology, config)
    simulation = None if compilation.refused else simulate(compilation.text, mesh, chip)
    plan = make_plan(config, mesh, chip, compilation, topology, tokens, price, simulation)
    if arguments.topology is None and not measured:
        plan = with_measured_step(plan, config, mesh, compilation)
    comparisons = compare(plan, measured) if measured else {}
    name = arguments.config or str(arguments.run_folder)
    next_to_run = comparison_text(measured, comparisons) if measured else ""
    if arguments.html is not None:
        from data.files.atomic import atomic_file
        from launch.plan_page import make_plan_page

        with atomic_file(arguments.html) as partial:
            partial.write_text(make_plan_page(name, plan, config, chip, simulation, next_to_run))
        log.info("the page of the plan is %s", arguments.html)
    if arguments.json:
        figures = {figure: comparison._asdict() for figure, comparison in comparisons.items()}
        run = {"run": asdict(measured), "comparison": figures} if measured else {}
        print(json.dumps(asdict(plan) | run))
        return 0
    print("\n\n".join(filter(None, [plan_text(plan, name), next_to_run])))
    return 0


def find_devices(arguments: argparse.Namespace) -> tuple[Sequence[Any], str]:
    """Returns the devices to plan for, of --topology or of this machine, and their name."""
    import jax

    if arguments.topology is None:
        return jax.devices(), "this machine"
    # Planning for other devices leaves this machine's accelerators free for other programs.
    jax.config.update("jax_platforms", "cpu")
    from train.planning.topology import topology_devices

    slices = int(arguments.slices)
    devices = topology_devices(arguments.topology, slices)
    return devices, arguments.topology + (f" × {slices} slices" if slices > 1 else "")


def compiled(config: ResolvedConfig, mesh: "Mesh") -> "Compilation":
    """Returns the compiled step of a config. Ctrl-C ends the program at once."""
    from train.planning.compilation import compile_step

    log.info("compiling for %d × %s as %s", mesh.size, mesh.devices.flat[0].device_kind, mesh_text(mesh.shape))
    # Python's own handler of Ctrl-C would first wait for the compiler, for minutes perhaps.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return compile_step(config, mesh, cache_folder(os.environ))
    finally:
        signal.signal(signal.SIGINT, handler)


def find_chip(topology: str | None, config: ResolvedConfig) -> "Chip":
    """Returns the figures of one device of a topology, or of this machine, some of which are measured."""
    from train.devices.hardware import with_usable_memory
    from train.planning.this_machine import local_chip
    from train.planning.topology import parse_topology

    if topology is not None:
        return with_usable_memory(parse_topology(topology)[0])
    log.info("measuring this machine")
    return local_chip(config.model.compute_dtype)


def with_measured_step(plan: "Plan", config: ResolvedConfig, mesh: "Mesh", compilation: "Compilation") -> "Plan":
    """Returns the plan with the measured seconds of this machine's own steps, unless they take too long."""
    from train.planning.this_machine import measured_step

    if not plan.fits or not plan.estimated_step_seconds:
        return plan
    if plan.estimated_step_seconds > MAX_MEASURED_SECONDS:
        log.info("a step takes too long to be measured")
        return plan
    log.info("running some steps")
    return replace(plan, measured_step_seconds=measured_step(config, mesh, compilation.executable))


def check(arguments: argparse.Namespace) -> None:
    """Raises InputError where RUN, --config, --slices or --search is wrong, or does not go with another."""
    if (arguments.run_folder is None) == (arguments.config is None):
        raise InputError("give --config=NAME|FILE|RUN, or a RUN whose steps the plan is compared with, one of the two")
    if arguments.run_folder is not None:
        remedy = f"give it with --config={arguments.run_folder}, which compares no steps"
        for name in arguments.overrides:
            raise InputError(f"--config.{name} would plan another step than the run's; {remedy}")
        if arguments.search is not None:
            raise InputError(f"--search would plan other steps than the run's; {remedy}")
    if not arguments.slices.isdecimal():
        raise InputError(f"--slices={arguments.slices}: give a whole number, at least 1")
    if arguments.slices != "1" and arguments.topology is None:
        raise InputError(f"--slices={arguments.slices} goes with --topology=CHIP:SHAPE")
    if arguments.search and not (arguments.search.isdecimal() and int(arguments.search)):
        raise InputError(f"--search={arguments.search}: give a whole number of programs to compile, at least 1")
    if arguments.search is not None and arguments.topology is None:
        raise InputError("--search goes with --topology=CHIP:SHAPE; for GPUs of this machine, too, as in h100:1x8")
    if arguments.html is not None:
        from launch.plan_page import GENERATOR

        check_output(arguments.html, "--html", GENERATOR, "page of a plan")
        if arguments.search is not None:
            raise InputError(f"--html={arguments.html} goes with one plan: give it with the flags that --search finds")
    if (sizes := arguments.batch_sizes) is not None:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes, re.ASCII):
            raise InputError(f"--batch-sizes={sizes}: give whole numbers of rows, as in --batch-sizes=256,512,1024")
        if arguments.search is None:
            raise InputError(
                f"--batch-sizes={sizes} goes with --search; for a single plan: --config.train.batch_size=B"
            )
        if BATCH in arguments.overrides:
            raise InputError(f"--batch-sizes={sizes} and --config.{BATCH}: give one of the two")
        if arguments.search and int(arguments.search) < len(sizes.split(",")):
            raise InputError(
                f"--search={arguments.search}: give at least one program for each of --batch-sizes={sizes}"
            )


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
    from launch.plan_search import MOST_SECONDS, compile_best, search_text
    from train.devices.hardware import with_usable_memory
    from train.planning.plan import tokens_of_run
    from train.planning.search import SEARCHED, interleaved
    from train.planning.topology import parse_topology

    chip = with_usable_memory(parse_topology(arguments.topology)[0])
    configs = [config]
    if arguments.batch_sizes is not None:
        configs = with_batch_sizes(arguments)
        arguments.tokens = arguments.tokens or str(tokens_of_run(config))
    legal = interleaved(candidates_by_size(configs, devices, chip, arguments.overrides))
    log.info("%s legal ways to run the step may fit; compiling the most promising", f"{len(legal):,}")
    shared = {name: getattr(arguments, name) for name in ("config", "topology", "slices", "tokens", "price")}
    flags = [f"--{name}={value}" for name, value in shared.items() if value is not None]
    flags += [f"--config.{name}={value}" for name, value in arguments.overrides.items() if name not in SEARCHED]
    most, most_seconds = max(MAX_COMPILED, len(configs)), MOST_SECONDS
    if arguments.search:
        most, most_seconds = int(arguments.search), math.inf
    outcomes = compile_best(legal, most, flags, most_seconds)
    plans = [outcome.plan for outcome in outcomes if outcome.plan]
    if arguments.json:
        print(json.dumps({"candidates": len(legal), "plans": [asdict(plan) for plan in plans]}))
        return 0
    print(search_text(outcomes, len(legal), arguments.batch_sizes is not None))
    if plans and plans[0].fits:
        print("\n" + plan_text(plans[0], arguments.config))
    return 0


def candidates_by_size(
    configs: Sequence[ResolvedConfig], devices: Sequence[Any], chip: "Chip", given: Collection[str]
) -> "list[list[Candidate]]":
    """Returns the candidates of each batch size, without sizes of which none may fit. Raises InputError if all are."""
    from train.planning.search import NothingFits, candidates

    by_size = []
    for config in configs:
        try:
            by_size.append(candidates(config, devices, chip, given))
        except NothingFits as error:
            if len(configs) == 1:
                raise
            log.warning("left out: %s", error)
    if not by_size:
        raise InputError("no step of any of these batch sizes may fit: give more devices or a smaller model")
    return by_size


def with_batch_sizes(arguments: argparse.Namespace) -> list[ResolvedConfig]:
    """Returns the config with each size of --batch-sizes. Raises InputError where one is not legal."""
    configs = []
    for size in dict.fromkeys(arguments.batch_sizes.split(",")):
        config = load_config(arguments.config, arguments.overrides | {BATCH: size})
        configs.append(config.resolved(config.tokenizer.vocab_size))
    return configs
