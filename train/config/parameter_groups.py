"""Settings of the optimizer by group of parameters (`optimizer.groups`).

A group is a role of the parameter table or a pattern of parameter names, as `fnmatch` has them. Roles come first, then
patterns in their order: a later group wins, field by field.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from model.config import VOCABULARY_MULTIPLE
from model.parametrization import size_factors
from train.config.config import Config, ResolvedConfig
from train.config.optimizer_config import DECAY, OF_GROUPS, RULES, OptimizerConfig
from train.config.values import check_value, nearest, short_repr, types_of

if TYPE_CHECKING:
    from model.parameters import Parameter

# The table's roles that share a group.
VECTORS = ("norm", "bias", "gate", "scalar")
ROLES = ("embedding", "position", "matrix", "router", "unembedding", "vector")
# Rules whose updates have elements of a fixed size, and singular values of one; `model.parametrization` has no others.
ELEMENTWISE = ("adamw", "lion")
ORTHOGONALIZED = ("muon", "normuon", "soap_muon")


def parameter_settings(config: ResolvedConfig) -> dict[str, OptimizerConfig]:
    """Returns the optimizer's settings of every parameter, by its name."""
    from model.parameters import parameter_table

    table = parameter_table(config.model)
    return {name: _at_size(config, name, p, _settings(config.optimizer, name, p)) for name, p in table.items()}


def _at_size(config: ResolvedConfig, name: str, p: "Parameter", s: OptimizerConfig) -> OptimizerConfig:
    """Returns settings at the model's size, given those at its base size; rate × decay is the same at both."""
    factors = size_factors(config.model, name, p.role, rule_of(s, p) in ORTHOGONALIZED)
    return replace(
        s,
        learning_rate=s.learning_rate * factors.rate,
        weight_decay=s.weight_decay / factors.rate,
        epsilon=s.epsilon * factors.epsilon,
    )


def rule_of(s: OptimizerConfig, p: "Parameter") -> str:
    """Returns the rule that updates a parameter."""
    return RULES[s.name][p.role != "matrix"]


def parametrization_problems(config: Config) -> list[str]:
    """Returns a line if `model.parametrization` has no rule for the optimizer."""
    c = config.optimizer
    known = [name for name, (rule, _) in RULES.items() if rule in (*ELEMENTWISE, *ORTHOGONALIZED)]
    if config.model.parametrization == "standard" or c.name not in RULES or c.name in known:
        return []
    given = f"model.parametrization = {config.model.parametrization}"
    return [f"{given} has no rule for optimizer.name = {c.name}; give {', '.join(known)}"]


def _settings(c: OptimizerConfig, name: str, p: "Parameter") -> OptimizerConfig:
    given: dict[str, Any] = {}
    for group, fields in _in_order(c.groups):
        if _has(group, name, p):
            given |= fields
    return replace(c, groups={}, **{field: check_value(x, types_of(OF_GROUPS[field])) for field, x in given.items()})


def _in_order(groups: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, fields) for name, fields in groups.items() if name in ROLES)
    yield from ((name, fields) for name, fields in groups.items() if name not in ROLES)


def _has(group: str, name: str, p: "Parameter") -> bool:
    if group in ROLES:
        return group == ("vector" if p.role in VECTORS else p.role)
    # What has the role "balance" has no gradient.
    return p.role != "balance" and fnmatchcase(name, group)


def group_problems(config: Config, has_table: bool) -> list[str]:
    """Returns one line for everything that is wrong with `optimizer.groups`, naming the group and the field.

    Args:
        has_table: the settings of model and data make a parameter table; otherwise only values are checked.
    """
    c = config.optimizer
    problems: list[str] = []
    right: dict[str, Any] = {}
    for group, fields in c.groups.items():
        label = f"optimizer.groups[{short_repr(group)}]"
        if not isinstance(group, str):
            problems.append(f"{label}: a group is a role or a pattern of names, as in 'embedding' or 'blocks.*'")
            continue
        if not isinstance(fields, dict) or not fields:
            problems.append(f'{label} is {short_repr(fields)}; it must hold settings, as in {{"learning_rate": 0.02}}')
            continue
        of_values, right[group] = _checked(config, label, fields)
        problems += of_values
    if has_table and c.groups and c.name in RULES:
        from model.parameters import parameter_table

        # The size of the vocabulary, which may follow from the tokenizer, changes no name.
        table = parameter_table(config.model.resolved(VOCABULARY_MULTIPLE, config.data.segment_length))
        for group in filter(lambda group: isinstance(group, str), c.groups):
            problems += _match_problems(replace(c, groups=right), group, table)
    return problems


def _checked(config: Config, label: str, fields: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns what is wrong with a group's settings, whatever parameters it has, and those of the right type."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in OF_GROUPS:
            name = field if isinstance(field, str) else short_repr(field)
            known = nearest(name, list(OF_GROUPS)) or f"; settings: {', '.join(OF_GROUPS)}"
            problems.append(f"{label}: {short_repr(field)} is no setting of a group{known}")
            continue
        try:
            values[field] = check_value(value, types_of(OF_GROUPS[field]))
        except ValueError as error:
            problems.append(f"{label}.{field} is {short_repr(value)}; it must be {error}")
    base = replace(config.optimizer, groups={})
    of_base = base.value_problems(label, config.train.num_steps)
    of_group = replace(base, **values).value_problems(label, config.train.num_steps)
    return problems + [line for line in of_group if line not in of_base], values


def _match_problems(c: OptimizerConfig, group: str, table: Mapping[str, "Parameter"]) -> list[str]:
    """Returns a line if a group has no parameters, or else one for each of its settings without effect on any."""
    label = f"optimizer.groups[{short_repr(group)}]"
    matched = {name: p for name, p in table.items() if _has(group, name, p)}
    if not matched:
        names = nearest(group, [*ROLES, *table]) or f"; roles: {', '.join(ROLES)}; names: {', '.join(table)}"
        return [f"{label} has none of the model's parameters{names}"]
    problems = []
    of_each = [_unused(_settings(c, name, p), p) for name, p in matched.items()]
    for field in c.groups.get(group, ()):
        if all(field in unused for unused in of_each):
            problems.append(f"{label}.{field} has no effect with {of_each[0][field]}; leave it out")
    return problems


def _unused(settings: OptimizerConfig, p: "Parameter") -> dict[str, str]:
    return settings.unused([rule_of(settings, p)]) | (
        {} if p.decay else dict.fromkeys(DECAY, "vectors, which do not decay")
    )
