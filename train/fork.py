"""A fork: a new run that begins with a checkpoint of another, its parent, where nothing changes.

`train.init_with` says what it takes over:
- all: weights, optimizer, count of steps and the place in the data. Unchanged, it does what the parent would have done;
  with other steps and another schedule it is a decay branch.
- optimizer: the same, but for the data, which may be other data and is read from its beginning.
- weights: those alone, as they are evaluated (their average, where there is one). Steps count from 0. Imported weights,
  a checkpoint of step 0, can be taken over in no other way.

The tokenizer is the parent's. Once the fork has a checkpoint of its own it goes on from that.
"""

import logging
from typing import Any, NamedTuple

import jax

from data.errors import InputError
from model.parameters import parameter_table
from train.config.changes import changes_of, table
from train.config.config import Config
from train.run.folder import Run
from train.run.name import split_name
from train.run.storage import steps_in

log = logging.getLogger("ziggurat")

# What cannot be another where the optimizer is taken over: the shape of its state.
OF_OPTIMIZER = ("optimizer.name", "optimizer.moment_dtype")


class Parent(NamedTuple):
    """The run that a fork begins with, its settings, and which checkpoint."""

    run: Run
    config: Config
    step: int


def parent_of(config: Config) -> Parent:
    """The checkpoint that `train.init_from` names. InputError where there is none."""
    assert config.train.init_from is not None
    try:
        folder, step = split_name(config.train.init_from)
        run, saved = Run.there(folder)
    except InputError as error:
        raise InputError(f"train.init_from = {config.train.init_from}: {error}") from None
    there = steps_in(run.checkpoints)
    if step is None:
        # What a run begins with must stand in its config, whatever its parent has saved since.
        newest = f"the newest is {folder}@{there[-1]}" if there else "it has none yet"
        raise InputError(f"train.init_from = {config.train.init_from} names no checkpoint, as RUN@STEP does; {newest}")
    if step not in there:
        raise InputError(
            f"train.init_from = {config.train.init_from}: there is no checkpoint of step {step}; there are {there}"
        )
    return Parent(run, saved, step)


def check_not_own_parent(config: Config, run: Run) -> None:
    """InputError where a fork would be its own parent."""
    if config.train.init_from and split_name(config.train.init_from)[0].resolve() == run.folder.resolve():
        raise InputError(
            f"train.run_dir = {run.folder} is the run that train.init_from = {config.train.init_from} takes from; "
            "name a new folder with --config.train.run_dir=FOLDER"
        )


def check_fork(config: Config) -> None:
    """InputError where these settings cannot begin with the parent's checkpoint; what differs otherwise is said."""
    parent, take, where = parent_of(config), config.train.init_with, config.train.init_from
    if parent.step == 0 and take != "weights":
        raise InputError(f"train.init_from = {where} holds weights alone; set train.init_with=weights")
    child = config.resolved(parent.config.model.vocab_size)
    by_rule = changes_of(parent.config, child)
    changes = by_rule["frozen"] + by_rule["warn"]
    model, optimizer, data = [], [], []
    if parameter_shapes(parent.config) != parameter_shapes(child):
        model = [change for change in by_rule["frozen"] if change.field.startswith("model.")]
    if take != "weights":
        optimizer = [change for change in changes if change.field in OF_OPTIMIZER]
    if take == "all":
        data = [change for change in by_rule["frozen"] if change.field.startswith(("data.", "train.seed"))]
    if refused := model + optimizer + data:
        remedy = "" if model else ", or train.init_with=weights" if optimizer else ", or train.init_with=optimizer"
        raise InputError(
            f"train.init_from = {where}: these cannot be taken over with train.init_with = {take}:\n"
            f"{table(refused)}\n  give the values from before{remedy}"
        )
    if take != "weights" and config.train.num_steps <= parent.step:
        raise InputError(
            f"train.num_steps = {config.train.num_steps}: with train.init_with = {take} the run has done the "
            f"{parent.step} steps of {where}; raise it"
        )
    told = [change for change in changes if not change.field.startswith("train.init_")]
    if told and jax.process_index() == 0:
        log.warning("other than in %s:\n%s", parent.run.folder, table(told))


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of all parameters."""
    return {name: p.shape for name, p in parameter_table(config.resolved().model).items()}


def fork_fields(config: Config) -> dict[str, Any]:
    """What the `start` event of a fork's beginning says of its parent."""
    parent = parent_of(config)
    return {"fork": {"run": str(parent.run.folder.resolve()), "step": parent.step, "with": config.train.init_with}}
