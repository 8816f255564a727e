"""Experiments: files in TOML that name a config, variants of it, and seeds. Whatever is wrong with one comes at once.

TOML, since an experiment is data: it runs no code, shows each variant as the lines that differ, and is read by Python's
own library. A variant's fields are those of flags, `optimizer.name = "muon"` for --config.optimizer.name=muon.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.config import NO_CORPUS
from data.errors import InputError
from data.files.json_file import read_small_file
from launch.presets import load_config
from train.config.changes import Change, text_of_value
from train.config.config import Config
from train.config.reading import nearest, short_repr, shown_name
from train.fork import checked_parent, refused_changes, remedy_of
from train.run.comparison import tokens_after
from train.run.folder import Run

TOKENS, TIME, NOTHING = "tokens", "time", "nothing"
KEYS = ("config", "seeds", "baseline", "equal", "shared", "variants")
# Fields that the command itself sets, or that would make runs share their checkpoints.
NOT_A_VARIANTS = {
    "train.seed": "seeds = [...] sets it",
    "train.run_dir": "each run has a folder of its own",
    "checkpoint.dir": "all runs would save to the same place",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,59}")
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Experiment:
    """Variants of a config, to be trained with each of the seeds.

    Attributes:
        config: NAME|FILE|RUN, from which all variants are made.
        equal: what the variants have in common: TOKENS, TIME (of their steps), or NOTHING.
        baseline: the variant that the others are compared with.
        overrides: texts of the fields by "group.field", of each variant; those that all share are among them.
        configs: settings of each variant, without a seed or a folder.
    """

    config: str
    seeds: tuple[int, ...]
    equal: str
    baseline: str
    overrides: dict[str, dict[str, str]]
    configs: dict[str, Config]


def read_experiment(file: Path, folder: Path | None = None) -> Experiment:
    """Reads an experiment. Raises InputError with all that is wrong with it, each line with the file and its line.

    Args:
        folder: that of its runs, if any have begun: a fork that has a checkpoint there needs its parent no more.
    """
    text, values = read_toml(file)
    problems = Problems(file, text)
    check_head(values, problems)
    variants = check_variants(values, problems)
    config, equal, seeds = values.get("config", ""), values.get("equal", TOKENS), values.get("seeds", [0])
    shared = fields_of(values.get("shared", {}), problems, "shared")
    overrides = {
        name: {"checkpoint.export": "false"} | shared | fields_of(variant, problems, "variants", name)
        for name, variant in variants.items()
    }
    configs: dict[str, Config] = {}
    if isinstance(config, str) and config:
        loaded = {name: loaded_variant(config, fields) for name, fields in overrides.items()}
        for name, problem in attributed({name: of_variant for name, (_, of_variant) in loaded.items()}):
            problems.add_of_field(name, problem)
        configs = {name: config for name, (config, _) in loaded.items() if config is not None}
    baseline = values.get("baseline", next(iter(variants), ""))
    if not problems.found:
        new = {name: seeds_without_checkpoint(name, seeds, folder) for name in configs}
        for name, problem in equality_problems(equal, baseline, configs) + fork_problems(configs, new):
            problems.add_of_field(name, problem)
    problems.raise_all()
    return Experiment(config, tuple(seeds), equal, baseline, overrides, configs)


def check_head(values: Mapping[str, Any], problems: "Problems") -> None:
    """Adds what is wrong with the keys of an experiment itself."""
    for key in values.keys() - set(KEYS):
        problems.add(f"{shown_name(key)}: there is no such key{nearest(key, list(KEYS))}", key)
    if not isinstance(values.get("config"), str) or not values["config"]:
        problems.add('config: name a preset, a file or a run, as in config = "tiny"', "config")
    equal, seeds = values.get("equal", TOKENS), values.get("seeds", [0])
    if equal not in (TOKENS, TIME, NOTHING):
        problems.add(f"equal is {short_repr(equal)}; it must be one of {TOKENS}, {TIME}, {NOTHING}", "equal")
    is_list = isinstance(seeds, list) and 0 < len(seeds) <= MOST_SEEDS
    if not is_list or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in seeds):
        problems.add("seeds must be a list of whole numbers from 0 to 4294967295, as in [0, 1, 2]", "seeds")
    elif len(set(seeds)) < len(seeds):
        problems.add("seeds has a number twice; name each once", "seeds")


def check_variants(values: Mapping[str, Any], problems: "Problems") -> dict[str, Any]:
    """Returns the tables of the variants, and adds what is wrong with their names and that of the baseline."""
    variants = values.get("variants")
    if not isinstance(variants, dict) or not variants:
        problems.add("there is no variant; give each a table, as in [variants.adamw]", "variants")
        return {}
    for name in variants:
        if not NAME.fullmatch(name):
            name_rule = "a name begins with a letter or digit, and has at most 60 of these and of _ . +"
            problems.add(f"variant {shown_name(name)}: {name_rule}", "variants", name)
    if (baseline := values.get("baseline")) is not None and baseline not in list(variants):
        known = ", ".join(map(shown_name, variants))
        problems.add(f"baseline is {short_repr(baseline)}; it must be one of the variants: {known}", "baseline")
    return variants


def read_toml(file: Path) -> tuple[str, dict[str, Any]]:
    """Returns the text and the values of a file. Raises InputError where it cannot be read, with the line if known."""
    if not file.exists():
        raise InputError(f"{file}: there is no such file; give an experiment, a file in TOML")
    text = ""
    try:
        text = read_small_file(file).decode()
        return text, tomllib.loads(text)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{file}: nested too deeply; make it simpler") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not valid UTF-8; write it as that") from None
    except ValueError as error:
        problem, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        number = f":{line[1]}" if line else f":{len(text.splitlines())}" if place else ""
        raise InputError(f"{file}{number}: no TOML: {problem}; correct it") from None


class Problems:
    """Collects what is wrong with an experiment, by its lines as far as these are found without the grammar of TOML.

    Attributes:
        found: pairs of a line and what is wrong there.
    """

    def __init__(self, file: Path, text: str):
        self.found: list[tuple[int, str]] = []
        self._file = file
        self._lines: dict[tuple[str, ...], int] = {}
        table: tuple[str, ...] = ()
        for number, line in enumerate(text.splitlines(), 1):
            is_header = line.lstrip().startswith("[")
            key, is_pair, _ = line.partition("=")
            # A line within a long value may be no TOML alone.
            with suppress(ValueError, RecursionError):
                path = path_in(tomllib.loads(line if is_header else f"{key} = 0" if is_pair else ""))
                if path:
                    table = path if is_header else table
                    self._lines.setdefault(path if is_header else table + path, number)

    def add(self, problem: str, *path: str) -> None:
        """Adds what is wrong with a key, at its line or that of the nearest table around it."""
        self.found.append((self._line_of(path), problem))

    def add_of_field(self, variant: str, problem: str) -> None:
        """Adds what is wrong with a variant, or with all if that is empty, at the line of the field that it names."""
        if problem.startswith("config="):
            self.add(problem, "config")
            return
        place = ("variants", variant) if variant else ("shared",)
        names = re.findall(r"^\w+(?:\.\w+)?|\w+\.\w+", problem)
        if names[:1] == ["seeds"]:
            place, names = ("seeds",), []
        for name in names:
            tables = (place, ("shared",))
            group = name.partition(".")[0]  # which an inline table may follow
            paths = [p for table in tables for p in ((*table, *name.split(".")), (*table, name), (*table, group))]
            # RUN@STEP sets these.
            paths += [("config",)] if name.startswith("train.init_") else []
            if known := [path for path in paths if path in self._lines]:
                place = known[0]
                break
        self.add(f"variant {variant}: {problem}" if variant else problem, *place)

    def raise_all(self) -> None:
        """Raises InputError with all that was found, in the order of the file."""
        if self.found:
            ordered = sorted(self.found, key=lambda found: found[0])
            raise InputError("\n".join(f"{self._file}:{line}: {problem}" for line, problem in ordered))

    def _line_of(self, path: tuple[str, ...]) -> int:
        below = [number for known, number in self._lines.items() if known[: len(path)] == path]
        if below:
            return min(below)
        return self._line_of(path[:-1]) if path else 1


def path_in(values: Any) -> tuple[str, ...]:
    """Returns the first keys of nested tables."""
    keys = []
    while isinstance(values, dict) and values:
        key, values = next(iter(values.items()))
        keys.append(key)
    return tuple(keys)


def fields_of(values: Any, problems: Problems, *table: str) -> dict[str, str]:
    """Returns the fields of a table as texts, as flags give them, by "group.field"."""
    if not isinstance(values, dict):
        problems.add(f"{short_repr(values)} is no table of fields, as in optimizer.learning_rate = 0.01", *table)
        return {}
    fields: dict[str, str] = {}
    for group, inside in values.items():
        for name, value in inside.items() if isinstance(inside, dict) else [("", inside)]:
            field = shown_name(f"{group}.{name}" if name else group)
            path = (*table, group, name) if name else (*table, group)
            if field in NOT_A_VARIANTS:
                problems.add(f"{field} cannot be set: {NOT_A_VARIANTS[field]}; leave it out", *path)
            elif field in fields:
                problems.add(f"{field} is there twice; give it once", *path)
            fields[field] = text_of(value)
    return fields


def text_of(value: Any) -> str:
    """Returns a value of TOML as the text of a flag."""
    if isinstance(value, str):
        return value
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists without end
        return short_repr(value)
    return text[1:-1] if isinstance(value, list) else text


def loaded_variant(config: str, fields: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    """Returns the settings of a variant, or None and all that is wrong with them."""
    try:
        loaded = load_config(config, fields)
    except InputError as error:
        return None, [line.removeprefix("--") for line in str(error).splitlines()]
    problems = []
    if loaded.data.corpus is None:
        problems.append(NO_CORPUS)
    if loaded.model.reward_head:
        problems.append("model.reward_head: a reward model has no bits a byte to compare; see metrics.jsonl")
    if not loaded.data.validation_fraction:
        problems.append("data.validation_fraction is 0, so there is no text to compare on; give a part, as in 0.01")
    if loaded.checkpoint.dir is not None and "checkpoint.dir" not in fields:
        problems.append(f"checkpoint.dir: {NOT_A_VARIANTS['checkpoint.dir']}; leave it at none")
    return loaded, problems


def attributed(problems: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Returns (variant, problem) of each problem; one that all variants have comes once, with "" as the variant."""
    common = [p for p in next(iter(problems.values()), []) if all(p in found for found in problems.values())]
    if len(problems) < 2:
        common = []
    own = [(name, problem) for name, found in problems.items() for problem in found if problem not in common]
    return [("", problem) for problem in common] + own


def equality_problems(equal: str, baseline: str, configs: Mapping[str, Config]) -> list[tuple[str, str]]:
    """Returns (variant, problem) for each variant that does not have in common what the experiment says."""
    problems = []
    tokens = {name: tokens_after(config, config.train.num_steps) for name, config in configs.items()}
    for name, config in configs.items():
        train = config.train
        if equal == TOKENS and tokens[name] != tokens[baseline]:
            problem = (
                f"it reads {tokens[name]:,} tokens and {baseline} {tokens[baseline]:,}; set train.num_steps so that "
            )
            problems.append((name, f'{problem}they are equal, or say equal = "{NOTHING}"'))
        if equal == TIME and train.num_steps != configs[baseline].train.num_steps:
            problems.append((name, f'train.num_steps follows from equal = "{TIME}"; only {baseline} can have its own'))
        if equal == TIME and train.init_from is not None and train.init_with != "weights":
            remedy = f'with equal = "{TIME}" give train.init_with=weights'
            problems.append((name, f"train.init_with = {train.init_with} counts its parent's steps; {remedy}"))
        if equal == TIME and train.batch_ramp_start:
            problems.append((name, f'train.batch_ramp_start makes steps unlike each other; with equal = "{TIME}" '
                                   "leave it at none"))  # fmt: skip
    return problems


def seeds_without_checkpoint(variant: str, seeds: Sequence[int], folder: Path | None) -> list[int]:
    """Returns the seeds whose run of a variant has no checkpoint of its own in the folder of all runs."""
    return [s for s in seeds if folder is None or Run(folder / f"{variant}-{s}").last_step() is None]


def fork_problems(configs: Mapping[str, Config], seeds: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """Returns (variant, problem) for what keeps new runs from starting with their parents' checkpoints.

    Args:
        seeds: those of the new runs of each variant.
    """
    forks = {name: config for name, config in configs.items() if config.train.init_from is not None}
    found = {name: problems_of_fork(forks[name], seeds[name]) if name in forks else [] for name in configs}
    return attributed(found)


def problems_of_fork(config: Config, seeds: Sequence[int]) -> list[str]:
    """Returns what of a variant, with each of these seeds, its parent's checkpoint does not allow."""
    if not seeds:
        return []
    try:
        parent = checked_parent(config)
    except InputError as error:
        return str(error).splitlines()
    refused: dict[tuple[str, Any], Change] = {}
    for seed in seeds:
        changes = refused_changes(replace(config, train=replace(config.train, seed=seed)), parent)
        refused |= {(change.field, change.now): change for change in changes}
    problems = []
    for change in refused.values():
        name = "seeds has" if change.field == "train.seed" else f"{change.field} ="
        values = f"{text_of_value(change.now)}, but {text_of_value(change.before)} in {config.train.init_from}"
        takes = f"train.init_with = {config.train.init_with} takes over"
        problems.append(f"{name} {values}, which {takes}; {remedy_of([change])}")
    return problems
