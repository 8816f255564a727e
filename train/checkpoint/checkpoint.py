"""Checkpoints: what a run needs to go on bit for bit, complete and checked or invisible.

A checkpoint is three Orbax items: `weights`, `optimizer` (plain nested dictionaries of arrays, whatever the mesh) and
`progress` (JSON, the same for all processes): the position of every stream, fingerprints, a checksum of each array and
one of itself. Where weights are averaged, `average` is a fourth. Orbax commits all by one rename; a checksum that does
not fit on restore shows damage that it would not.
"""

import json
import logging
import math
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN
from orbax.checkpoint.checkpoint_utils import construct_restore_args

from data.errors import InputError
from model.parameters import Parameter
from model.trees import flattened
from train.checkpoint.checkpoint_reader import CheckpointReader
from train.checkpoint.checksum import DIGEST_KEY, check_progress_digest, checksums, progress_digest
from train.checkpoint.trees import restore_structure, to_plain_tree
from train.config.config import CheckpointConfig
from train.devices.processes import broadcast_json, on_first_process
from train.run.storage import PathLike, is_remote, storage_errors
from train.step.state import State

log = logging.getLogger("ziggurat")
# What the libraries raise where a file of a checkpoint is not as it was.
DAMAGE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError)
# Items of arrays.
ARRAY_ITEMS = ("weights", "optimizer", "average")
# Those that are read for other uses than training.
READ_BY_LAYER = ("weights", "average")
# Where a layer of such an array has so many bytes on a device, it is stored on its own.
LAYER_CHUNK_BYTES = 2**18


def save_arguments(item: str, tree: Any) -> Any:
    """How the arrays of an item lie on the disk: large weights of the blocks by layer, so that one is read alone.

    Of all others what a device holds is one chunk, which is read as a whole.
    """

    def of_array(path: tuple[Any, ...], array: jax.Array) -> ocp.SaveArgs:
        stacked = item in READ_BY_LAYER and path[0].key == "blocks"
        layer = array.sharding.shard_shape(array.shape)[1:] if stacked else ()
        return ocp.SaveArgs(shard_axes=(0,) if math.prod(layer) * array.dtype.itemsize >= LAYER_CHUNK_BYTES else ())

    return jax.tree.map_with_path(of_array, tree)


def without_traceback(record: logging.LogRecord) -> bool:
    """Whether a line of a log comes without."""
    return record.exc_info is None


def without_closed_loops(unraisable: Any) -> None:
    """What Python says of an error that nobody can catch; not of a read or write whose fellow has failed before it."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class Checkpoints:
    """The checkpoints of one run. Every process calls every method at the same step.

    Args:
        folder: where they are, here or in a bucket.
        config: what is kept; none: they are read, and nothing in the folder changes.
    """

    def __init__(self, folder: PathLike, config: CheckpointConfig | None = None):
        kept = None
        if config:
            kept = AnyPreservationPolicy([LatestN(config.keep)])
            if config.keep_every_steps:
                kept.policies.append(EveryNSteps(config.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            create=config is not None,
            cleanup_tmp_directories=config is not None,
            enable_async_checkpointing=config is not None,
        )
        # Compression would make float32 a twelfth smaller, and a save take over half as long again.
        arrays = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAY_ITEMS}
        items = {**arrays, "progress": ocp.JsonCheckpointHandler()}
        self.folder, self._newest = epath.Path(folder), 0
        place = self.folder if is_remote(folder) else self.folder.absolute()
        # Each error that it raises is also logged, for each of its threads and tasks, with pages of where they stood.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(without_traceback)
        sys.unraisablehook = without_closed_loops
        self._manager = ocp.CheckpointManager(place, item_handlers=items, options=options)
        # The manager's own way to restore ends with a barrier, to which a process that finds damage does not come.
        self._reader = ocp.CompositeCheckpointHandler(**items)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first, as process 0 sees them."""
        found: list[int] = broadcast_json(lambda: sorted(self._manager.all_steps()))
        return found

    def save(self, state: State, progress: Mapping[str, Any]) -> None:
        """Save the state; its step is the checkpoint's.

        When this returns, the state may change: what is left is to write a copy of it behind the next steps. Until that
        is complete the checkpoint is invisible. A save waits for the one before, and raises what went wrong with it.

        Raises:
            StorageError: it cannot be written, or the one before could not.
        """
        step = int(state["step"])
        items = {name: to_plain_tree(tree) for name, tree in state.items() if name != "step"}
        sums = {name: jax.tree.map(int, checksums(tree)) for name, tree in items.items()}
        arrays = {name: ocp.args.PyTreeSave(tree, save_args=save_arguments(name, tree)) for name, tree in items.items()}
        noted = {**progress, "checksums": sums}
        noted[DIGEST_KEY] = progress_digest(noted)
        arguments = ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(noted))
        self.wait()
        self._newest = step
        with self._writing():
            saved = self._manager.save(step, args=arguments)
        assert saved, f"Orbax did not save step {step}"

    def wait(self) -> None:
        """Until all that was saved is complete. StorageError where it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def _writing(self) -> AbstractContextManager[None]:
        return storage_errors(f"the checkpoint of step {self._newest}", self.folder)

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest undamaged checkpoint as (state, progress), or none where there is none at all.

        Damaged ones that are newer are set aside: the run will save those steps again. An average that the checkpoint
        does not have begins with its weights; one that is not asked for is left there.

        Args:
            abstract: shapes, dtypes and shardings of the state to fill.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        for step in reversed(self.steps()):
            if found := self._state(step, abstract):
                self._set_aside([newer for newer in self.steps() if newer > step])
                return found
        if self.steps():
            raise InputError(f"all checkpoints in {self.folder} are damaged; restore them from a copy, or start anew")
        return None

    def restore_step(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The checkpoint of one step, as by `restore`. InputError where there is none, or it is damaged."""
        self._check_step(step)
        if found := self._state(step, abstract):
            return found
        raise InputError(f"the checkpoint of step {step} in {self.folder} is damaged; there are {self.steps()}")

    def restore_weights(self, abstract: Any, step: int | None = None) -> tuple[int, Any]:
        """(step, weights) of one checkpoint, by default the newest undamaged one; their average where it has one.

        Raises:
            InputError: there is no such checkpoint, or it is damaged.
        """
        if step is not None:
            self._check_step(step)
        for candidate in [step] if step is not None else reversed(self.steps()):
            if found := self._read(candidate, lambda averaged: {"average" if averaged else "weights": abstract}):
                return candidate, next(iter(found[0].values()))
        raise InputError(f"{self.folder} holds no checkpoint that can be read")

    def open_weights(
        self, parameters: Mapping[str, Parameter], step: int | None = None
    ) -> tuple[int, CheckpointReader]:
        """(step, weights) as of `restore_weights`, to be read a layer at a time. One process alone may call it.

        Raises:
            InputError: there is no such checkpoint, or what says what is in it is damaged.
        """
        there = sorted(self._manager.all_steps())
        if step is not None and step not in there:
            raise InputError(f"{self.folder} has no checkpoint of step {step}; there are {there}")
        for candidate in [step] if step is not None else reversed(there):
            place = self.folder / str(candidate)
            try:
                progress = json.loads((place / "progress" / "metadata").read_text())
                check_progress_digest(progress)
                item = "average" if "average" in progress["checksums"] else "weights"
                return candidate, CheckpointReader(place / item, flattened(progress["checksums"][item]), parameters)
            except DAMAGE_ERRORS as error:
                log.warning("the checkpoint of step %d is damaged (%s); it is not used", candidate, error)
        raise InputError(f"{self.folder} holds no checkpoint that can be read")

    def _check_step(self, step: int) -> None:
        if step not in self.steps():
            raise InputError(f"{self.folder} has no checkpoint of step {step}; there are {self.steps()}")

    def _state(self, step: int, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """(state, progress) of one checkpoint; none, with a warning, where it is damaged."""
        wanted = {name: to_plain_tree(tree) for name, tree in abstract.items() if name != "step"}

        def wanted_of(has_average: bool) -> dict[str, Any]:
            return {name: tree for name, tree in wanted.items() if name != "average" or has_average}

        found = self._read(step, wanted_of)
        if found is None:
            return None
        arrays, progress = found
        if "average" in wanted and "average" not in arrays:
            log.warning("train.ema_decay: the average begins with the weights of step %d", step)
            arrays["average"] = jax.tree.map(jnp.copy, arrays["weights"])
        if "average" not in wanted and "average" in progress["checksums"]:
            log.warning("train.ema_decay is 0: the average up to step %d ends there", step)
        count = jax.device_put(jnp.asarray(step, jnp.int32), abstract["step"].sharding)
        return {"step": count} | {name: restore_structure(abstract[name], arrays[name]) for name in wanted}, progress

    def _read(
        self, step: int, wanted: Callable[[bool], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Items of one checkpoint and its progress; none, with a warning, where a checksum does not fit.

        `wanted` gives {item: abstract tree}, told whether the checkpoint has an average.
        """
        damage = ""
        try:
            place = self._manager.directory / str(step)
            progress = self._reader.restore(place, ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            check_progress_digest(progress)
            abstract = wanted("average" in progress["checksums"])
            arguments = {
                name: ocp.args.PyTreeRestore(tree, restore_args=construct_restore_args(tree))
                for name, tree in abstract.items()
            }
            found = self._reader.restore(place, ocp.args.Composite(**arguments))
            arrays = {name: found[name] for name in abstract}
            expected = flattened({name: progress["checksums"][name] for name in abstract})
        except PermissionError:
            raise
        except Exception as error:
            # Where an array's bytes are damaged Orbax may raise a plain one.
            if type(error) is not Exception and not isinstance(error, DAMAGE_ERRORS):
                raise
            # The libraries' own text goes on for kilobytes.
            cause = error.__cause__ or error
            damage = textwrap.shorten(f"{type(cause).__name__}: {cause}", 160)
        # One process that cannot read it decides for all; the checksums are the same everywhere.
        if not multihost_utils.process_allgather(np.array(bool(damage))).any():
            # Item by item as in a save, which then has its programs already.
            actual = flattened({name: jax.tree.map(int, checksums(tree)) for name, tree in arrays.items()})
            damage = next((name for name in actual if actual[name] != expected.get(name)), "")
            if not damage:
                return arrays, progress
        log.warning("the checkpoint of step %d is damaged (%s); it is not used", step, damage or "on another process")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again; those of an earlier time are removed."""

        def rename() -> None:
            for aside in self.folder.glob("*.damaged"):
                aside.rmtree()
            for step in steps:
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged")

        if steps:
            on_first_process(rename)
            self._manager.reload()

    def close(self) -> None:
        """Release the threads."""
        self._manager.close()
