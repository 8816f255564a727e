"""The runs of an experiment: trains what is not finished, and compares what they have learned."""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from data.errors import InputError
from data.files.atomic import atomic_file
from data.files.json_file import read_json
from launch.arguments import check_output
from launch.compare_text import Compared, as_json, comparison_text, notes, table_rows
from launch.experiment import TIME, Experiment, read_experiment
from launch.local import DONE, PREEMPTED
from launch.many_runs import PlannedRun, command_line, folder_problems, plan_run, train_each, unfinished
from launch.step_times import check_devices, time_steps
from train.config.config import to_json
from train.run.comparison import compare_outcomes, outcome_of
from train.run.run_name import CONFIG_FILE
from train.run.step_log import median_rate, read_metrics

Runs = dict[tuple[str, int], PlannedRun]  # by variant and seed


def run_experiment(arguments: argparse.Namespace) -> int:
    """Trains what is not finished, writes the page and prints the table; or prints the commands.

    Returns the status of the first run that failed, if any: its variant has no figures, and the others have theirs.
    """
    from launch.page.overlay_page import make_overlay_page
    from launch.page.report_page import GENERATOR

    if arguments.json and arguments.print_commands:
        raise InputError("--json has no effect with --print-commands; leave one out")
    folder = arguments.to or Path("runs") / arguments.file.stem
    experiment = read_experiment(arguments.file, folder)
    page = folder / "compare.html"
    if (folder / CONFIG_FILE).exists():
        raise InputError(f"{folder} is a run itself; name another folder with --to=FOLDER")
    check_output(page, "--to", GENERATOR, "report")
    runs = planned_runs(experiment, folder, arguments.print_commands)
    if arguments.print_commands:
        print("".join(f"{command_line(planned)}\n" for planned in unfinished([*runs.values()])), end="")
        return 0
    failed = train_each([*runs.values()])
    if PREEMPTED in failed.values():
        return PREEMPTED
    compared = compare_runs(experiment, folder, runs, failed)
    # A run that failed early may have left nothing to draw.
    begun = {place: planned.run for place, planned in runs.items() if planned.run.config_file.exists()}
    groups = {name: [begun[name, seed] for seed in experiment.seeds if (name, seed) in begun]
              for name in experiment.configs}  # fmt: skip
    with atomic_file(page) as partial:
        rows = table_rows(compared.figures, experiment)
        drawn = {name: of_variant for name, of_variant in groups.items() if of_variant}
        partial.write_text(make_overlay_page(arguments.file.stem, drawn, rows, notes(compared)))
    print(json.dumps(as_json(compared)) if arguments.json else f"{comparison_text(compared)}\ncurves: {page}")
    return next(iter(failed.values()), DONE)


def planned_runs(experiment: Experiment, folder: Path, only_planned: bool = False) -> Runs:
    """Returns all runs, seed by seed. With equal = "time" their steps are timed first, unless that is known.

    Args:
        only_planned: whether these runs are to be started elsewhere, so that this machine's devices matter little.

    Raises InputError with all folders that hold other runs, and all configs that do not fit the devices.
    """
    is_timed = experiment.equal == TIME
    steps = {name: begun_steps(folder, name, experiment) for name in experiment.configs} if is_timed else {}
    steps |= {experiment.baseline: experiment.configs[experiment.baseline].train.num_steps} if is_timed else {}
    # The number of steps is no change of settings as long as it is not known.
    runs = make_runs(experiment, folder, steps)
    if problems := folder_problems([*runs.values()]):
        raise InputError("\n".join(problems))
    is_unknown = None in steps.values()
    trains = not only_planned and unfinished([*runs.values()])
    if trains and not is_timed:
        check_devices(experiment.configs)
    if is_unknown or (trains and is_timed):
        seconds = step_seconds(experiment, folder)
        if is_unknown:
            own = seconds[experiment.baseline] * (steps[experiment.baseline] or 0)
            steps |= {name: max(1, round(own / seconds[name])) for name, known in steps.items() if known is None}
            runs = make_runs(experiment, folder, steps)
    return runs


def make_runs(experiment: Experiment, folder: Path, steps: Mapping[str, int | None]) -> Runs:
    """Returns the runs, with a number of steps by variant where it is given. InputError where that is impossible."""
    runs = {}
    for seed in experiment.seeds:
        for name, overrides in experiment.overrides.items():
            fields = overrides | {"train.seed": str(seed)}
            if (number := steps.get(name)) is not None:
                fields["train.num_steps"] = str(number)
            try:
                runs[name, seed] = plan_run(folder / f"{name}-{seed}", experiment.config, fields)
            except InputError as error:
                lines = str(error).splitlines()
                raise InputError("\n".join(f"variant {name} in {number} steps: {line}" for line in lines)) from None
    return runs


def begun_steps(folder: Path, variant: str, experiment: Experiment) -> int | None:
    """Returns the number of steps that the runs of a variant were begun with, or None if there are none yet."""
    for seed in experiment.seeds:
        planned = plan_run(folder / f"{variant}-{seed}", experiment.config, experiment.overrides[variant])
        if planned.run.config_file.exists():
            return planned.run.load_config().train.num_steps
    return None


def step_seconds(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Returns the seconds of a step of each variant, from an earlier call or timed in turns now."""
    if known := known_step_seconds(experiment, folder):
        return known
    seconds = time_steps(experiment.configs)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "step_seconds.json") as partial:
        partial.write_text(json.dumps({"variants": fingerprint(experiment), "seconds": seconds}) + "\n")
    return seconds


def known_step_seconds(experiment: Experiment, folder: Path) -> dict[str, float]:
    """Returns the times that an earlier call has left for the same variants; none where there are none."""
    file = folder / "step_seconds.json"
    if not file.exists():
        return {}
    values = read_json(file, "remove it, and they are timed again")
    seconds = values.get("seconds")
    if values.get("variants") != fingerprint(experiment) or not isinstance(seconds, dict):
        return {}
    is_good = all(isinstance(s, float) and 0 < s < math.inf for s in seconds.values())
    return seconds if is_good and seconds.keys() == experiment.configs.keys() else {}


def fingerprint(experiment: Experiment) -> str:
    """Returns what changes with the settings of any variant."""
    return hashlib.sha256("".join(map(to_json, experiment.configs.values())).encode()).hexdigest()


def compare_runs(experiment: Experiment, folder: Path, runs: Runs, failed: Mapping[str, int] | None = None) -> Compared:
    """Returns what finished runs say. Raises InputError where their settings have changed meanwhile.

    Args:
        failed: exit statuses of runs that did not come to their end, by name; their variants have no figures.
    """
    # A config file may have been edited while they were training.
    if problems := folder_problems([*runs.values()]):
        raise InputError("\n".join(problems))
    seeds, failed = experiment.seeds, failed or {}
    names = [n for n in experiment.configs if not any(runs[n, seed].name in failed for seed in seeds)]
    outcomes = {name: [outcome_of(runs[name, seed].run) for seed in seeds] for name in names}
    step_tokens = {name: c.train.batch_size * c.data.segment_length for name, c in experiment.configs.items()}
    seconds = known_step_seconds(experiment, folder)
    in_turns = bool(seconds)
    if not seconds:
        for name in names:
            rates = [median_rate(read_metrics(runs[name, seed].run.metrics)) for seed in seeds]
            seconds[name] = step_tokens[name] * len(rates) / max(sum(rates), 1e-9)
    texts = [{tuple(runs[name, seed].run.held_out_texts()) for name in names} for seed in seeds]
    figures = compare_outcomes(outcomes, experiment.baseline, seconds, step_tokens)
    return Compared(experiment, figures, in_turns, all(len(of_seed) <= 1 for of_seed in texts), dict(failed))
