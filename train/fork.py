"""Forks: a new run that starts from a checkpoint of another run, its parent, which does not change.

`train.init_with` names what the fork takes over:
- all: weights, optimizer, number of steps and place in the data. Without changes it does what the parent would have
  done; with other steps and another schedule it is a decay branch.
- optimizer: the same except for the data, which may be other data and is read from its beginning.
- weights: those alone, as they are evaluated (their average, if there is one). Steps count from 0. Imported or
  merged weights, a checkpoint of step 0, can be taken over in no other way.

The tokenizer is the parent's. Once the fork has a checkpoint of its own, it resumes from that.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from data.errors import InputError
from model.parameters import parameter_table
from train.config.changes import Change, changes_of, table
from train.config.config import Config
from train.run.folder import Run
from train.run.run_name import split_name
from train.run.storage import checkpoint_steps_in

log = logging.getLogger("ziggurat")

# Fields that cannot change if the optimizer is taken over, because its state depends on them.
OPTIMIZER_STATE_FIELDS = ("optimizer.name", "optimizer.moment_dtype", "optimizer.soap_max_dim")


class Parent(NamedTuple):
    """The run that a fork starts from, its settings, and the step of the checkpoint."""

    run: Run
    config: Config
    step: int


def parent_of(config: Config) -> Parent:
    """Returns the run and checkpoint that `train.init_from` names. Raises InputError if it does not exist."""
    where = config.train.init_from
    assert where is not None
    try:
        folder, step = split_name(where)
        run, saved = Run.load(folder)
    except InputError as error:
        raise InputError(f"train.init_from = {where}: {error}") from None
    steps = checkpoint_steps_in(run.checkpoints)
    if step is None:
        # The config must name the step, since the parent may save more of them later.
        newest = f"the newest is {folder}@{steps[-1]}" if steps else "it has none yet"
        raise InputError(f"train.init_from = {where} names no checkpoint, as RUN@STEP does; {newest}")
    if step not in steps:
        raise InputError(f"train.init_from = {where}: it has no checkpoint of step {step}, only {steps}")
    return Parent(run, saved, step)


def check_fork(config: Config) -> None:
    """Raises InputError if these settings cannot start from the parent's checkpoint; logs other differences."""
    parent = checked_parent(config)
    if refused := refused_changes(config, parent):
        raise InputError(
            f"train.init_from = {config.train.init_from}: these cannot be taken over with train.init_with = "
            f"{config.train.init_with}:\n{table(refused)}\n  {remedy_of(refused)}"
        )
    changes = changes_of(parent.config, config.resolved(parent.config.model.vocab_size))
    others = [change for change in changes["frozen"] + changes["warn"] if not change.field.startswith("train.init_")]
    if others and jax.process_index() == 0:
        log.warning("changed from %s:\n%s", parent.run.folder, table(others))


def checked_parent(config: Config) -> Parent:
    """Returns the parent. Raises InputError if its checkpoint, or the number of its steps, does not allow this fork."""
    parent, take, where = parent_of(config), config.train.init_with, config.train.init_from
    if parent.step == 0 and take != "weights":
        raise InputError(f"train.init_from = {where} holds weights alone; set train.init_with=weights")
    if take != "weights" and config.train.num_steps <= parent.step:
        raise InputError(
            f"train.num_steps = {config.train.num_steps}: with train.init_with = {take} the run has done the "
            f"{parent.step} steps of {where}; raise it"
        )
    return parent


def refused_changes(config: Config, parent: Parent) -> list[Change]:
    """Returns the fields that differ from the parent's and cannot: of the model, then the optimizer, then the data."""
    take = config.train.init_with
    child = config.resolved(parent.config.model.vocab_size)
    by_rule = changes_of(parent.config, child)
    frozen, changes = by_rule["frozen"], by_rule["frozen"] + by_rule["warn"]
    shapes, before = parameter_shapes(child), parameter_shapes(parent.config)
    if gets_head(config, parent):
        shapes, before = without_last_floor(shapes), without_last_floor(before)
    is_reshaped = shapes != before
    model = [change for change in frozen if is_reshaped and change.field.startswith("model.")]
    optimizer = [change for change in changes if take != "weights" and change.field in OPTIMIZER_STATE_FIELDS]
    data = [change for change in frozen if take == "all" and change.field.startswith(("data.", "train.seed"))]
    return model + optimizer + data


def remedy_of(refused: Sequence[Change]) -> str:
    """Returns what a user can do about refused changes: the least of what the parent has is left behind."""
    if any(change.field.startswith("model.") for change in refused):
        return "give the values from before"
    takes_weights = any(change.field in OPTIMIZER_STATE_FIELDS for change in refused)
    return f"give the values from before, or train.init_with={'weights' if takes_weights else 'optimizer'}"


def gets_head(config: Config, parent: Parent) -> bool:
    """True if the fork is a reward model that begins with a language model's weights, but for the last floor's."""
    begins = config.model.reward_head and not parent.config.model.reward_head
    return begins and config.train.init_with == "weights"


def without_last_floor(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters, by name, that a language model and a reward model share."""
    return {name: value for name, value in parameters.items() if not name.startswith("unembedding.")}


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters by name."""
    return {name: p.shape for name, p in parameter_table(config.resolved().model).items()}
