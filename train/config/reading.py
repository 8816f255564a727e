"""Makes a config from the values of a preset, a file or a run, and from flags."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from data.config import TEXT_FIELDS
from data.errors import InputError
from data.printable import name_problem
from data.tokenizer.tokenizer import FIM_TOKENS
from settings import unused_problems
from train.config.config import Config, config_fields
from train.config.parameter_groups import group_problems, parametrization_problems
from train.config.values import check_value, nearest, parse_text, short_repr, shown_name, types_of

# Fields that may hold any text; all other texts are names.
TEXTS = ("train.on_event", "evaluation.prompt", *(f"data.{name}" for name in TEXT_FIELDS))


def make_config(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Makes a config from a preset's values and the command line's.

    Args:
        values: {group: {field: value}}; fields that are missing keep their defaults.
        overrides: {"group.field": text}, parsed by the field's type; they win.

    Raises:
        InputError: names every unknown field, wrong type and impossible combination, one on each line.
    """
    problems: list[str] = []
    known = {f"{group}.{name}": field for group, name, field in config_fields()}
    kinds: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(Config)}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in kinds}
    from_preset: dict[str, Any] = {}
    for group, fields in values.items():
        if group not in chosen:
            group = shown_name(group)
            problems.append(f"{group}: there is no such group{nearest(group, list(chosen))}")
        elif not isinstance(fields, dict):
            example = next(name for name in known if name.startswith(group + "."))
            problems.append(f"{group} is {short_repr(fields)}; it must hold fields, as in {example}")
        else:
            from_preset |= {f"{group}.{shown_name(name)}": value for name, value in fields.items()}
    for source, parse in ((from_preset, check_value), (overrides or {}, parse_text)):
        for name, value in source.items():
            if name not in known:
                problems.append(f"{name}: there is no such field{nearest(name, list(known))}")
                continue
            group, field = name.split(".")
            try:
                chosen[group][field] = parse(value, types_of(known[name]))
            except ValueError as error:
                problems.append(f"{name} is {short_repr(value)}; it must be {error}")

    config = Config(**{group: kind(**chosen[group]) for group, kind in kinds.items()})
    problems += config_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    return config


def config_problems(config: Config) -> list[str]:
    """Returns one line for every value that is impossible alone or with others, naming fields and a remedy."""
    c = config
    groups = (c.model, c.data, c.tokenizer, c.mesh, c.objective, c.train, c.checkpoint, c.recovery, c.evaluation)
    problems = [problem for group in groups for problem in group.problems()]
    problems += c.optimizer.problems(c.train.num_steps)
    problems += objective_problems(config)
    problems += parametrization_problems(config)
    problems += group_problems(config, has_table=not (c.model.problems() or c.data.problems()))
    for group, name, _ in config_fields():
        field = f"{group}.{name}"
        if field in TEXTS or any(known.startswith((f"{field} ", f"{field}[", f"{field}:")) for known in problems):
            continue
        texts = _texts_in(getattr(getattr(c, group), name))
        problems += [f"{field} {problem}" for problem in map(name_problem, texts) if problem][:1]
    if c.model.max_positions and c.model.max_positions < c.data.segment_length:
        problems.append(
            f"model.max_positions = {c.model.max_positions} is less than data.segment_length = "
            f"{c.data.segment_length}; raise it, or leave it at none"
        )
    trains_tokenizer = c.tokenizer.path is None and c.train.init_from is None
    if trains_tokenizer and c.data.fim_tokens not in (None, ",".join(FIM_TOKENS)):
        problems.append(
            f"data.fim_tokens = {c.data.fim_tokens} is for another's tokenizer; the run trains its own, with the marks "
            f"{', '.join(FIM_TOKENS)}: leave it at none, or give tokenizer.path"
        )
    first = "batch_size" if c.train.batch_ramp_start is None else "batch_ramp_start"
    rows = getattr(c.train, first)
    name, each = f"train.{first} = {rows}", c.objective.rows_of_prompt
    if c.objective.samples:
        name += f" / objective.group_size = {each}"
    is_whole = each >= 1 and rows % each == 0
    if is_whole and c.num_streams >= 1 and each <= rows <= 2**24 and (rows := rows // each) % c.num_streams:
        divisor = min(divisors(rows), key=lambda d: abs(d - c.num_streams))
        problems.append(f"data.num_streams = {c.num_streams} does not divide {name}; nearest that does: {divisor}")
    return problems


def objective_problems(config: Config) -> list[str]:
    """Returns one line for everything in other groups that does not fit the objective."""
    name, problems = config.objective.name, _reward_problems(config)
    if not config.objective.compares and config.data.compares:
        problems.append(
            f"data.rejected_field is given, and objective.name = {name} compares no answers; give dpo, simpo or reward"
        )
    if name == "next_token":
        return problems
    if config.objective.samples:
        problems += sampling_problems(config)
    elif config.data.corpus is not None and not config.data.compares:
        problems.append(
            f"objective.name = {name} compares two answers; name the field of the rejected one with data.rejected_field"
        )
    for field in ("label_smoothing", "z_loss"):
        if getattr(config.model, field):
            problems.append(f"model.{field} has no effect with objective.name = {name}; leave it at 0")
    if config.objective.uses_reference and config.train.init_from is None:
        problems.append(
            f"objective.name = {name} compares with the weights that the run begins with; name them with "
            "train.init_from=RUN@STEP and train.init_with=weights"
        )
    return problems


def sampling_problems(config: Config) -> list[str]:
    """Returns one line for everything in other groups that does not fit an objective of sampled answers."""
    c, problems = config, []
    if c.train.batch_size % c.objective.group_size:
        problems.append(
            f"objective.group_size = {c.objective.group_size} does not divide train.batch_size = {c.train.batch_size}, "
            "the answers of a step; give a multiple of it"
        )
    if c.data.segmentation != "document":
        problems.append(
            f"data.segmentation is {c.data.segmentation}; with objective.name = grpo it must be document, so that each "
            "row has one prompt"
        )
    prompts = c.data.has_prompts
    if c.data.corpus is not None and not prompts:
        problems.append(
            "objective.name = grpo needs prompts; name their field with data.prompt_field, or data.messages_field"
        )
    if c.objective.max_new_tokens >= c.data.segment_length:
        problems.append(
            f"objective.max_new_tokens = {c.objective.max_new_tokens} leaves a row of data.segment_length = "
            f"{c.data.segment_length} no room for a prompt; lower the one, or raise the other"
        )
    for name, is_used in (("model: dropout", c.model.dropout), ("train.batch_ramp_start", c.train.batch_ramp_start)):
        if is_used:
            problems.append(f"{name} cannot be used with objective.name = grpo; leave it out")
    return problems


def _reward_problems(config: Config) -> list[str]:
    """Returns one line for everything that does not fit a reward head, or an objective that needs one."""
    name, evaluation = config.objective.name, config.evaluation
    if not config.model.reward_head:
        return [f"objective.name = {name} trains scores; set model.reward_head=true"] if name == "reward" else []
    if name != "reward":
        return [f"model.reward_head gives scores, not tokens, and objective.name is {name}; set objective.name=reward"]
    unused = dict.fromkeys(("prompt", "tasks"), "model.reward_head = True")
    if evaluation.sample_tokens:
        # A sample of no tokens is what there is.
        unused["sample_tokens"] = unused["prompt"]
    return unused_problems("evaluation", evaluation, unused)


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number in order, after as many trials as its root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _texts_in(value: Any) -> list[str]:
    """Returns a text, or all texts in a mapping."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts_in(part)]
    return [value] if isinstance(value, str) else []
