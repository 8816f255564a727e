"""The way of a ladder: its flags are checked, its runs planned and trained, and their law fitted and shown."""

import argparse
import json
import math
import re
from pathlib import Path

from data.config import NO_CORPUS
from data.errors import InputError
from launch.arguments import check_output
from launch.ladder_runs import Ladder, check_folder, measure, planned_ladder, save, step_seconds
from launch.ladder_text import as_json, plan_json, plan_text, result_text
from launch.many_runs import say, train_all, unfinished
from launch.presets import load_config
from train.config.config import Config
from train.planning.budget import Budget, Machine
from train.planning.scaling import LEAST_SIZES
from train.run.run_name import CONFIG_FILE

UNITS = ("flops", "days", "dollars")


def run_ladder(arguments: argparse.Namespace) -> int:
    """Prints the plan of the runs, trains what is not finished, fits the law, and prints what it predicts."""
    from launch.ladder_page import make_ladder_page
    from launch.page.report_page import GENERATOR

    numbers = checked_numbers(arguments)
    folder, page = arguments.to, arguments.to / "ladder.html"
    if (folder / CONFIG_FILE).exists():
        raise InputError(f"{folder} is a run itself; name another folder with --to=FOLDER")
    check_output(page, "--to", GENERATOR, "report")
    target = load_config(arguments.config, arguments.overrides)
    check_target(target)
    flags = {name: numbers[name] for name in ("rungs", "scale", "longest", "least_rows", "least_steps")}
    ladder = planned_ladder(arguments.config, arguments.overrides, target, folder, flags)
    check_folder(ladder)
    budget = find_budget(arguments, numbers, target, ladder)
    waiting = unfinished(ladder.runs)
    if waiting or arguments.dry_run:
        seconds = step_seconds(ladder)
        if arguments.dry_run:
            print(json.dumps(plan_json(ladder, seconds)) if arguments.json else plan_text(ladder, seconds))
            return 0
        for line in plan_text(ladder, seconds).splitlines():
            say(line)
    save(ladder)
    if status := train_all(ladder.runs):
        return status
    result = measure(ladder, budget)
    write_page(page, make_ladder_page(str(folder), result))
    print(json.dumps(as_json(result)) if arguments.json else f"{result_text(result)}\npage: {page}")
    return 0


def write_page(page: Path, text: str) -> None:
    """Writes the page atomically."""
    from data.files.atomic import atomic_file

    with atomic_file(page) as partial:
        partial.write_text(text)


def checked_numbers(arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the numbers of the flags. Raises InputError with all that are wrong."""
    problems, numbers = [], {}
    whole_numbers = {"rungs": LEAST_SIZES, "least_rows": 1, "least_steps": 1}
    for name, least in (whole_numbers | {"scale": 1}).items():
        whole = name in whole_numbers
        numbers[name] = number_of(getattr(arguments, name))
        is_good = numbers[name] >= least and math.isfinite(numbers[name])
        if not is_good or (whole and numbers[name] != int(numbers[name])):
            kind = "a whole number of" if whole else "a number of"
            problems.append(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give {kind} at least {least}")
    for name in ("longest", "price", "mfu"):
        if (text := getattr(arguments, name)) is not None:
            numbers[name] = number_of(text)
            most = 1 if name == "mfu" else math.inf
            if not 0 < numbers[name] <= most or math.isinf(numbers[name]):
                problems.append(f"--{name}={text}: give a number above 0{' and at most 1' if most == 1 else ''}")
    if arguments.topology is None:
        unused = [name for name in ("price", "mfu") if getattr(arguments, name) is not None]
        problems += [f"--{name} goes with --topology=CHIP:SHAPE" for name in unused]
    if arguments.budget is not None:
        problems += budget_problems(arguments)
    if problems:
        raise InputError("\n".join(problems))
    return numbers


def number_of(text: str) -> float:
    """Returns the number that a text is, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def split_budget(text: str) -> tuple[float, str]:
    """Returns the number and the unit of a budget: FLOPs where there is none. NaN where it is no number above 0."""
    number, unit = re.fullmatch(r"(.*?)\s*([a-zA-Z]*)", text, re.S).groups()  # type: ignore[union-attr]
    value = number_of(number)
    return (value if 0 < value < math.inf else math.nan), unit or "flops"


def budget_problems(arguments: argparse.Namespace) -> list[str]:
    """Returns what is wrong with --budget."""
    value, unit = split_budget(arguments.budget)
    given = f"--budget={arguments.budget}"
    if math.isnan(value) or unit not in UNITS:
        return [f"{given}: give FLOPs, as in 1e19, or 30days or 5000dollars with --topology=CHIP:SHAPE"]
    if unit != "flops" and arguments.topology is None:
        return [f"{given} goes with --topology=CHIP:SHAPE"]
    if unit == "dollars" and arguments.price is None:
        return [f"{given} goes with --price=P, dollars for a device-hour"]
    return []


def check_target(config: Config) -> None:
    """Raises InputError with all that keeps a config from being the target of a ladder."""
    problems = []
    if config.data.corpus is None:
        problems.append(NO_CORPUS)
    if config.model.reward_head:
        problems.append("model.reward_head: a reward model has no bits a byte to predict; give the config of its model")
    if not config.data.validation_fraction:
        problems.append("data.validation_fraction is 0, so there is no loss to predict; give a part, as in 0.01")
    if config.checkpoint.dir is not None:
        problems.append("checkpoint.dir: all runs would save to the same place; leave it at none")
    if config.train.init_from is not None:
        problems.append("train.init_from: a ladder is of new weights, as other sizes cannot take these; leave it out")
    if not config.optimizer.learning_rate:
        problems.append("optimizer.learning_rate is 0, from which no rung's follows; give the target's own")
    problems += [
        f"optimizer.groups[{name!r}] has its own {field}: trunks are constant and branches decay, all parameters "
        "alike; leave it out"
        for name, given in config.optimizer.groups.items()
        for field in ("schedule", "decay_fraction")
        if field in given
    ]
    if problems:
        raise InputError("\n".join(problems))


def find_budget(arguments: argparse.Namespace, numbers: dict[str, float], target: Config, ladder: Ladder) -> Budget:
    """Returns the budget in FLOPs, and the machine if there is one. InputError where it pays for no rung's run."""
    machine = None
    if arguments.topology is not None:
        from train.planning.topology import parse_topology

        chip, shape = parse_topology(arguments.topology)
        mfu = numbers["mfu"] if "mfu" in numbers else estimated_mfu(arguments.topology, target)
        devices = math.prod(shape)
        machine = Machine(arguments.topology, devices, devices * chip.peak_flops * mfu, mfu, numbers.get("price"))
    if arguments.budget is None:
        return Budget(ladder.target_flops, machine)
    value, unit = split_budget(arguments.budget)
    flops = value if machine is None or unit == "flops" else machine.flops_of(value, unit)
    if flops < ladder.cheapest_flops:
        raise InputError(
            f"--budget={arguments.budget} is {flops:.2g} FLOPs, less than the {ladder.cheapest_flops:.2g} of the "
            "ladder's cheapest run; give more"
        )
    return Budget(flops, machine)


def estimated_mfu(topology: str, target: Config) -> float:
    """Returns the share of the peak that a plan of the target estimates. InputError where the target does not fit."""
    from launch.plan import compiled, find_chip, find_devices
    from train.devices.mesh import make_mesh
    from train.planning.plan import make_plan

    config = target.resolved(target.tokenizer.vocab_size)
    devices, name = find_devices(argparse.Namespace(topology=topology, slices="1"))
    mesh = make_mesh(config, devices)
    plan = make_plan(config, mesh, find_chip(topology, config), compiled(config, mesh), name)
    if not plan.fits or plan.estimated_mfu is None:
        raise InputError(
            f"--topology={topology}: the target does not fit its memory; see `ziggurat plan`, or give --mfu"
        )
    return plan.estimated_mfu
