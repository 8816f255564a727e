"""Checkpoints: all that a run needs to resume bit for bit, complete and checked or invisible.

A checkpoint consists of three Orbax items: `weights`, `optimizer` (plain nested dictionaries of arrays, whatever the
mesh) and `progress` (JSON, the same for all processes): the position of every stream, fingerprints, a checksum of each
array, and a digest of itself. Copies of the weights, `average` and `reference`, are further items. Orbax commits all
by one rename; a checksum that differs on restore shows damage that Orbax would not notice.

The newest checkpoint is found in four ways: `Checkpoints.steps` for all processes of a run; `Run.last_step` without
opening the checkpoints; `launch.local.newest_step` and `launch.slurm.newest_step_command`, a shell command, because
launchers start without JAX and Orbax.
"""

import json
import logging
import math
import textwrap
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN
from orbax.checkpoint.checkpoint_utils import construct_restore_args

from data.errors import InputError, StorageError
from model.parameters import Parameter
from model.trees import flattened
from train.checkpoint.checkpoint_reader import CheckpointReader, ocdbt_store
from train.checkpoint.checksum import DIGEST_KEY, check_progress_digest, checksums, progress_digest
from train.checkpoint.trees import restore_structure, to_plain_tree
from train.config.config import CheckpointConfig
from train.devices.collectives import all_gather_json, broadcast_json, on_first_process
from train.run.storage import PathLike, check_place, is_remote, storage_errors, uncached_listings
from train.step.state import State

log = logging.getLogger("ziggurat")
# What the libraries raise if a file of a checkpoint is damaged.
DAMAGE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError)
# Items that begin as copies of the weights where a checkpoint has none, and how a warning names them.
COPIES = {"average": "train.ema_decay: the average", "reference": "objective.name: the reference"}
# Checkpoints that are tried before a reader gives up: a run that trains may remove each while it is read.
MOST_TRIES = 20
# A layer with at least this many bytes on a device is stored as a chunk of its own.
LAYER_CHUNK_BYTES = 2**18


def check_regular(place: epath.Path) -> None:
    """Raises ValueError if a checkpoint on this machine has a pipe or a device, which may be read without end."""
    for path in () if is_remote(place) else Path(place).rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} is no file")


def save_arguments(item: str, tree: Any) -> Any:
    """Returns how Orbax stores an item: one layer of a block's large weights is a chunk, to be read alone."""

    def arguments(path: tuple[Any, ...], array: jax.Array) -> ocp.SaveArgs:
        # Weights and their average are also read layer by layer, outside training.
        stacked = item != "optimizer" and path[0].key == "blocks"
        layer = array.sharding.shard_shape(array.shape)[1:] if stacked else ()
        return ocp.SaveArgs(shard_axes=(0,) if math.prod(layer) * array.dtype.itemsize >= LAYER_CHUNK_BYTES else ())

    return jax.tree.map_with_path(arguments, tree)


class Checkpoints:
    """The checkpoints of one run, only read without a config. Every process calls every method at the same step."""

    def __init__(self, folder: PathLike, config: CheckpointConfig | None = None):
        policy = None
        if config:
            policy = AnyPreservationPolicy([LatestN(config.keep)])
            if config.keep_every_steps:
                policy.policies.append(EveryNSteps(config.keep_every_steps))
        writes = config is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=writes, cleanup_tmp_directories=writes, enable_async_checkpointing=writes
        )
        # Compression would make float32 a twelfth smaller, and a save over half as long again.
        items = {
            name: ocp.PyTreeCheckpointHandler(use_compression=False)
            for name in ("weights", "optimizer", "average", "reference")
        }
        items |= {"progress": ocp.JsonCheckpointHandler()}
        self.folder = epath.Path(folder)
        self._newest = 0
        self._unread: dict[str, str] = {}  # an array of each item that has been saved and not been read back
        check_place(self.folder, writes)
        place = self.folder if is_remote(folder) else self.folder.absolute()
        with uncached_listings():
            self._manager = ocp.CheckpointManager(place, item_handlers=items, options=options)
        # The manager's own restore ends with a barrier, which a process that finds damage would never reach.
        self._reader = ocp.CompositeCheckpointHandler(**items)

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first, as process 0 sees them."""
        return list(broadcast_json(lambda: sorted(self._manager.all_steps())))

    def save(self, state: State, progress: Mapping[str, Any]) -> None:
        """Saves the state under its step. Raises StorageError if this checkpoint or the one before cannot be written.

        When this returns, the state may change: a copy is written while the next steps run. Until that is complete, the
        checkpoint is invisible.
        """
        step = int(state["step"])
        items = {name: to_plain_tree(tree) for name, tree in state.items() if name != "step"}
        sums = {name: jax.tree.map(int, checksums(tree)) for name, tree in items.items()}
        arrays = {name: ocp.args.PyTreeSave(tree, save_args=save_arguments(name, tree)) for name, tree in items.items()}
        progress = {**progress, "checksums": sums}
        progress[DIGEST_KEY] = progress_digest(progress)
        arguments = ocp.args.Composite(**arrays, progress=ocp.args.JsonSave(progress))
        self.wait()
        self._newest = step
        self._unread = {item: name for item, tree in items.items() for name in [*flattened(tree)][:1]}
        with self._writing():
            saved = self._manager.save(step, args=arguments)
        assert saved, f"Orbax did not save step {step}"

    def wait(self) -> None:
        """Waits until all saves are complete. Raises StorageError if one cannot be written, or not read back."""
        with self._writing():
            self._manager.wait_until_finished()
        unread, self._unread = self._unread, {}
        for item, name in unread.items() if jax.process_index() == 0 else ():
            store = ocdbt_store(self.folder / str(self._newest) / item)
            try:
                found = tensorstore.KvStore.open(store).result().read(f"{name}/.zarray").result().state == "value"
            except DAMAGE_ERRORS:
                found = False
            if not found:  # Orbax only warns where it finds no files of a process to merge.
                raise StorageError(
                    f"the checkpoint of step {self._newest} in {self.folder} cannot be read back ({item})"
                )

    def _writing(self) -> AbstractContextManager[None]:
        return storage_errors(f"the checkpoint of step {self._newest}", self.folder)

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest undamaged checkpoint as (state, progress), or None if there is no checkpoint.

        Newer checkpoints, which are damaged, are renamed: the run will save those steps again. If the checkpoint has no
        average or reference and one is wanted, it starts from its weights; one that is not wanted is not read. Raises
        InputError if there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            if restored := self._state(step, abstract):
                self._set_aside([newer for newer in steps if newer > step])
                return restored
        if steps:
            raise InputError(
                f"all checkpoints in {self.folder} are damaged; restore them from a copy, or start a new run"
            )
        return None

    def restore_step(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """Returns the checkpoint of one step, like `restore`. InputError if it is damaged, or there is none."""
        next(self._candidates(self.steps, step))
        if restored := self._state(step, abstract):
            return restored
        raise InputError(f"the checkpoint of step {step} in {self.folder} is damaged; there are {self.steps()}")

    def restore_weights(self, abstract: Any, step: int | None = None) -> tuple[int, Any]:
        """Returns (step, weights) of one checkpoint, by default the newest undamaged one; its average if it has one.

        Raises InputError if there is no such checkpoint, or it is damaged.
        """
        for candidate in self._candidates(self.steps, step):
            if items := self._read(candidate, lambda items: {"average" if "average" in items else "weights": abstract}):
                return candidate, next(iter(items[0].values()))
        raise InputError(f"{self.folder} holds no checkpoint that can be read")

    def open_weights(
        self, parameters: Mapping[str, Parameter], step: int | None = None, averaged: bool = True
    ) -> tuple[int, CheckpointReader]:
        """Returns (step, weights) as `restore_weights` does, to be read layer by layer. One process alone may call it.

        Without `averaged` they are the trained weights themselves, even where the checkpoint has their average.

        Raises InputError if there is no such checkpoint, or its progress is damaged.
        """
        for candidate in self._candidates(lambda: sorted(self._manager.all_steps()), step):
            place = self.folder / str(candidate)
            try:
                progress = self.progress(candidate)
                item = "average" if averaged and "average" in progress["checksums"] else "weights"
                return candidate, CheckpointReader(place / item, flattened(progress["checksums"][item]), parameters)
            except DAMAGE_ERRORS as error:
                self._warn(candidate, str(error))
        raise InputError(f"{self.folder} holds no checkpoint that can be read")

    def progress(self, step: int) -> dict[str, Any]:
        """Returns what was saved with the state of a step. Raises one of `DAMAGE_ERRORS` if it is damaged."""
        check_regular(self.folder / str(step))
        progress: dict[str, Any] = json.loads((self.folder / str(step) / "progress" / "metadata").read_text())
        check_progress_digest(progress)
        return progress

    def _candidates(self, list_steps: Callable[[], list[int]], step: int | None) -> Iterator[int]:
        """Yields the steps to try: the given one, or the newest that has not been tried, as listed after each try.

        A run that trains removes old checkpoints, even while they are read. InputError if the given one does not exist.
        """
        steps = list_steps()
        if step is not None:
            if step not in steps:
                raise InputError(f"{self.folder} has no checkpoint of step {step}; there are {steps}")
            yield step
            return
        tried: set[int] = set()
        while len(tried) < MOST_TRIES and (left := [step for step in steps if step not in tried]):
            yield left[-1]
            tried.add(left[-1])
            self._manager.reload()
            steps = list_steps()

    def _warn(self, step: int, damage: str) -> None:
        if not (self.folder / str(step)).exists():
            log.warning("the checkpoint of step %d was removed while it was read, by the run that trains", step)
        else:
            log.warning("the checkpoint of step %d is damaged (%s); it is not used", step, damage)

    def _state(self, step: int, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """Returns (state, progress) of one checkpoint, or None, with a warning, if it is damaged."""
        wanted = {name: to_plain_tree(tree) for name, tree in abstract.items() if name != "step"}

        def stored(items: Container[str]) -> dict[str, Any]:
            return {name: tree for name, tree in wanted.items() if name not in COPIES or name in items}

        restored = self._read(step, stored)
        if restored is None:
            return None
        arrays, progress = restored
        for name in [name for name in COPIES if name in wanted and name not in arrays]:
            log.warning("%s begins with the weights of step %d", COPIES[name], step)
            arrays[name] = jax.tree.map(jnp.copy, arrays["weights"])
        if "average" not in wanted and "average" in progress["checksums"]:
            log.warning("train.ema_decay is 0: the average up to step %d ends there", step)
        count = jax.device_put(jnp.asarray(step, jnp.int32), abstract["step"].sharding)
        return {"step": count} | {name: restore_structure(abstract[name], arrays[name]) for name in wanted}, progress

    def _read(
        self, step: int, wanted: Callable[[Container[str]], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Returns the items of one checkpoint and its progress, or None, with a warning, if a checksum differs.

        `wanted` returns {item: abstract tree}; its argument has the names of the checkpoint's items.
        """
        damage = ""
        try:
            place = self._manager.directory / str(step)
            check_regular(place)
            progress = self._reader.restore(place, ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            check_progress_digest(progress)
            abstract = wanted(progress["checksums"])
            arguments = {
                name: ocp.args.PyTreeRestore(tree, restore_args=construct_restore_args(tree))
                for name, tree in abstract.items()
            }
            restored = self._reader.restore(place, ocp.args.Composite(**arguments))
            arrays = {name: restored[name] for name in abstract}
            expected = flattened({name: progress["checksums"][name] for name in abstract})
        except PermissionError:
            raise
        except Exception as error:
            # If an array's bytes are damaged, Orbax may raise a plain Exception.
            if type(error) is not Exception and not isinstance(error, DAMAGE_ERRORS):
                raise
            # The libraries' own text is kilobytes long.
            cause = error.__cause__ or error
            damage = textwrap.shorten(f"{type(cause).__name__}: {cause}", 160)
        # If one process cannot read it, none uses it. The checksums are the same on all processes.
        if not any(all_gather_json(bool(damage))):
            # Item by item as in a save, which then finds its programs compiled.
            actual = flattened({name: jax.tree.map(int, checksums(tree)) for name, tree in arrays.items()})
            damage = next((name for name in actual if actual[name] != expected.get(name)), "")
            if not damage:
                return arrays, progress
        self._warn(step, damage or "on another process")
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again; removes those renamed earlier."""

        def rename() -> None:
            for path in list(self.folder.iterdir()):
                if path.name.endswith(".damaged"):
                    path.rmtree()
            for step in steps:
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged")

        if steps:
            on_first_process(rename)
            self._manager.reload()

    def close(self) -> None:
        """Ends the threads that write."""
        self._manager.close()
