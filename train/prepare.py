"""What a run stands on before its first step: a folder of its own, its text, its tokenizer, what it holds out."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.config import OWN_FIELDS
from data.errors import InputError
from data.formats.stdlib import snapshot_stdlib
from data.mixture import MixedStream, Mixture, field_of, first_positions, open_mixture, open_streams
from data.tokenizer import Tokenizer, copy_tokenizer, holds_tokenizer, train_tokenizer
from train.changes import Change, changes_of, table
from train.config import Config, config_fields
from train.evaluate import run_tasks
from train.fork import check_folders, check_fork, parent_of
from train.lease import Lease
from train.mesh import once
from train.metrics import read_steps
from train.recovery import inherited, read_ledger, write_ledger
from train.run import Run, Text, write_atomically
from train.saved import split_name
from train.storage import check_writable
from train.writers import missing_packages

if TYPE_CHECKING:
    from train.tasks import Tasks

log = logging.getLogger("ziggurat")

ACCEPT = "accept the change of the data with --config.data.accept_changes=true"
ANOTHER_RUN = "start another run with --config.train.run_dir=FOLDER"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` finds or makes.

    Attributes:
        config: every derived field filled in.
        mixture: the text.
        tokenizer: of the run.
        held_out: the documents that it evaluates on at its end.
        identity: what the order of the data follows from, kept in each checkpoint.
        tasks: of lm-evaluation-harness, that it evaluates on.
    """

    config: Config
    mixture: Mixture
    tokenizer: Tokenizer
    held_out: list[Text]
    identity: dict[str, Any]
    tasks: "Tasks | None" = None


def prepare(config: Config, run: Run, lease: Lease) -> Prepared:
    """Make or find everything in the run's folder that the first step needs. All processes call it together.

    Before it writes there, it takes the lease.

    Raises:
        InputError: the folder is something else's, or config, corpus or tokenizer don't fit it or each other.
    """
    check_folder(config, run)
    tasks = run_tasks(config.evaluation)
    mixture = open_run_mixture(config, run)
    # A run begins with its first checkpoint. What a start without one has left is made anew.
    begins = run.last_step() is None
    if begins:
        mixture.check()
        if config.train.init_from:
            check_fork(config)
    once(lease.take)
    if begins:
        once(lambda: claim(config, run))
    tokenizer = run_tokenizer(config, run, mixture)
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size = {given} is less than the tokenizer's {tokenizer.vocab_size} pieces; "
            "raise it, or leave it at none"
        )
    config = config.resolved(tokenizer.vocab_size)
    make_once(run.held_out, lambda: run.save_held_out(held_out_of(mixture, config.evaluation.max_bytes)))
    held_out = run.held_out_texts()
    if config.data.validation_fraction and not held_out and jax.process_index() == 0:
        log.warning("no document is held out, so nothing is evaluated; raise data.validation_fraction, or give more")
    fingerprints = mixture.fingerprints() | {"tokenizer": tokenizer.fingerprint}
    check_same_everywhere(fingerprints)
    return Prepared(config, mixture, tokenizer, held_out, identity_of(config, mixture) | fingerprints, tasks)


def check_folder(config: Config, run: Run) -> None:
    """InputError where a folder cannot be, holds something else, or a run that this config would not continue."""
    existing = next(path for path in (run.folder.absolute(), *run.folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        raise InputError(f"train.run_dir = {run.folder}: {existing} {problem}; name another folder")
    if missing := missing_packages(config):
        raise InputError("\n".join(missing))
    check_folders(config, run)
    last_step = run.last_step()
    if run.is_claimed():
        check_moved_checkpoints(run, last_step)
    once(lambda: check_writable(run.checkpoints))
    if last_step is None:
        return
    if last_step == 0:
        raise InputError(
            f"train.run_dir = {run.folder} holds imported weights, with which another run can begin: "
            f"--config={run.folder}@0 --config.train.run_dir=FOLDER"
        )
    saved = run.load_config()
    changes, accepts = changes_of(saved, config.resolved(saved.model.vocab_size)), config.data.accept_changes
    if frozen := [change for change in changes["frozen"] if not (accepts and change.field.startswith("data."))]:
        accept = ACCEPT + ", " if all(change.field.startswith("data.") for change in frozen) else ""
        raise InputError(
            f"{run.folder} holds a run with other settings, which cannot change on resume:\n{table(frozen)}\n"
            f"  give the values from before, {accept}or {ANOTHER_RUN}"
        )
    if config.train.num_steps < last_step:
        raise InputError(
            f"train.num_steps = {config.train.num_steps}: the run in {run.folder} has done {last_step} steps already; "
            f"raise it, or {ANOTHER_RUN}"
        )
    if changes["warn"] and jax.process_index() == 0:
        log.warning("changed on resume:\n%s", table(changes["warn"]))


def check_moved_checkpoints(run: Run, last_step: int | None) -> None:
    """InputError where the run's newest checkpoint is where it was saved before, and not in `checkpoint.dir`."""
    before, _ = Run.there(run.folder)
    if before.checkpoints != run.checkpoints and (newest := before.last_step() or 0) > (last_step or 0):
        raise InputError(
            f"checkpoint.dir: {run.folder} has saved its step {newest} in {before.checkpoints}, and {run.checkpoints} "
            f"has {f'step {last_step}' if last_step else 'nothing'}; move the checkpoints there, or give the old place"
        )


def claim(config: Config, run: Run) -> None:
    """Make the folder this run's, and empty of what an earlier start has left."""
    run.save_config(config)
    run.clear()
    if config.train.init_from and config.train.init_with == "all":
        # Its data goes on as the parent's does, without what that leaves out.
        write_ledger(run.recovery, inherited(read_ledger(parent_of(config).run.recovery)))


def open_run_mixture(config: Config, run: Run) -> Mixture:
    """The corpora that the config names; the default one is kept in the run's folder on first use."""

    def stdlib() -> str:
        def make() -> None:
            parent = folder_of_parent(config)
            if parent and parent.snapshot.exists():
                write_atomically(run.snapshot, parent.snapshot.read_text())
            else:
                snapshot_stdlib(run.snapshot)

        make_once(run.snapshot, make)
        return str(run.snapshot)

    return open_mixture(config.resolved().data, stdlib, leave_out=run.folder)


def folder_of_parent(config: Config) -> Run | None:
    """The run that this one begins with a checkpoint of; none: none."""
    return Run(split_name(config.train.init_from)[0]) if config.train.init_from else None


def held_out_of(mixture: Mixture, size: int) -> list[Text]:
    """The first held-out documents of each corpus, of `size` bytes in all, shared equally."""
    share = size // len(mixture.sources)
    return [
        text
        for name, documents in mixture.held_out()
        for text in up_to((Text(document.text, document.prompt, name) for document in documents), share)
    ]


def some_of(held_out: list[Text], size: int) -> list[Text]:
    """The first of these documents, of `size` bytes in all, shared equally by their corpora."""
    names = dict.fromkeys(text.corpus for text in held_out)
    return [
        text for name in names for text in up_to((text for text in held_out if text.corpus == name), size // len(names))
    ]


def run_tokenizer(config: Config, run: Run, mixture: Mixture) -> Tokenizer:
    """The run's tokenizer: what is there, else a copy (of a fork's parent or `tokenizer.path`), else a new one.

    Raises:
        InputError: `tokenizer.path` has none, or another than the run began with.
    """
    path = Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None

    def make() -> None:
        parent = folder_of_parent(config)
        if source := parent.tokenizer if parent else path:
            copy_tokenizer(Tokenizer.load(source), run.tokenizer)
        else:
            train_run_tokenizer(config, mixture, run.tokenizer)

    once(lambda: None if holds_tokenizer(run.tokenizer) else make())
    tokenizer = Tokenizer.load(run.tokenizer)
    if path and path.exists() and Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"tokenizer.path = {path} is not the tokenizer that the run in {run.folder} began with; leave it at none"
        )
    return tokenizer


def train_run_tokenizer(config: Config, mixture: Mixture, folder: Path) -> Tokenizer:
    """Train the tokenizer that the config asks for on a bounded sample of the training documents.

    Of several corpora each gives the part that its first weight says.
    """
    log.info("training a tokenizer of %d pieces", config.tokenizer.vocab_size)
    sample: list[str] = []
    for source, share in zip(mixture.sources, mixture.shares(0), strict=True):
        texts = source.corpus.training_texts(config.train.seed)
        size = config.tokenizer.sample_bytes * share // sum(mixture.shares(0))
        sample += [text.text for text in up_to(map(Text, texts), size)] if size else []
    return train_tokenizer(sample, config.tokenizer.vocab_size, folder)


def up_to(texts: Iterable[Text], size: int) -> list[Text]:
    """The first texts, of `size` bytes in all, prompts included; the last is cut where it is longer."""
    taken: list[Text] = []
    for text in texts:
        encoded = text.text.encode()
        size -= len(text.prompt.encode())
        if len(encoded) >= size:
            cut = encoded[: max(size, 0)].decode(errors="ignore")
            return [*taken, text._replace(text=cut)] if cut else taken
        taken.append(text)
        size -= len(encoded)
    return taken


def identity_of(config: Config, mixture: Mixture) -> dict[str, Any]:
    """The settings that the order of the data follows from, by name (C1); beside them stand the fingerprints."""
    found = {
        f"data.{name}": getattr(config.data, name)
        for group, name, setting in config_fields()
        if group == "data" and setting.metadata.get("resume", "frozen") == "frozen"
    }
    for source in mixture.sources if isinstance(config.data.corpus, dict) else []:
        found[f"{field_of(source.name)}.weight"] = [list(stage) for stage in source.weights]
        for name in OWN_FIELDS:
            found[f"{field_of(source.name)}.{name}"] = getattr(source.config, name)
    return found | {"train.seed": config.train.seed}


def go_on(
    progress: Mapping[str, Any], prepared: Prepared, trained: Path, instead: str = ANOTHER_RUN
) -> tuple[Prepared, np.ndarray]:
    """What a checkpoint's run goes on with, and where in the data: there, or if the data has changed in a new epoch.

    Other data has other held-out documents too. All processes call it together.

    Args:
        progress: of the checkpoint.
        prepared: for the run that goes on.
        trained: the folder of the run that has saved the checkpoint.
        instead: what else can be done about other data.

    Raises:
        InputError: corpus, tokenizer or data settings are not what the checkpoint was trained on, and
            `data.accept_changes` is not set; or all of their epochs have been read.
    """
    if "identity" not in progress:
        raise InputError(f"{trained} was begun by an older version; start another run")
    saved, now, config = progress["identity"], prepared.identity, prepared.config
    positions = np.array(progress["positions"], np.int64)
    changes = [Change(name, saved.get(name), now.get(name)) for name in saved | now if saved.get(name) != now.get(name)]
    if not changes:
        return prepared, positions
    if not config.data.accept_changes:
        raise InputError(
            f"the data is not what the run in {trained} has been trained on:\n{table(changes)}\n"
            f"  restore it, {ACCEPT}, or {instead}"
        )
    if jax.process_index() == 0:
        log.warning("changed on resume:\n%s", table(changes))
    moves = not all(change.field.endswith((".weight", ".epochs")) for change in changes)
    if moves:
        epoch = int(positions[:, :, 0].max()) + 1
        assert config.data.num_streams is not None
        positions = first_positions(prepared.mixture, config.data.num_streams, epoch)
    for source, epochs in zip(prepared.mixture.sources, positions[:, :, 0].min(axis=0).tolist(), strict=True):
        if source.config.epochs is not None and epochs >= source.config.epochs:
            raise InputError(
                f"{field_of(source.name)}: {epochs} epochs have been read before the change; give more than that "
                "(data.epochs), or leave it at none"
            )
    if moves:
        log.warning("the streams begin anew, with epoch %d, and other documents are held out", epoch)
        run = Run.of(config)
        once(lambda: run.save_held_out(held_out_of(prepared.mixture, config.evaluation.max_bytes)))
        prepared = replace(prepared, held_out=run.held_out_texts())
    return prepared, positions


def data_fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a `Prepared.identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def first_step(config: Config) -> int:
    """The step (from 0) that reads the beginning of the data: in a fork with the optimizer its parent's, else 0."""
    if config.train.init_from and config.train.init_with == "optimizer":
        return split_name(config.train.init_from)[1] or 0
    return 0


def streams_before(
    step: int, config: Config, run: Run, mixture: Mixture, tokenizer: Tokenizer
) -> tuple[int, dict[int, MixedStream]]:
    """(s, all streams at the beginning of the batch that step s read), for the newest logged s up to `step`, from 0.

    Raises:
        InputError: the run has read other data around this step than its config and corpus say now.
    """
    logged = [record for _, record in read_steps(run.positions)]
    identity = identity_of(config, mixture) | mixture.fingerprints() | {"tokenizer": tokenizer.fingerprint}
    before = [record for record in logged if record["step"] <= step]
    if any(record["data"] != data_fingerprint(identity) for record in before[-1:] or logged[:1]):
        raise InputError(
            f"the data that {run.folder} read in step {step + 1} is not what its corpus, tokenizer and data settings "
            "are now; restore them"
        )
    assert config.data.num_streams is not None
    begin, positions = first_step(config), first_positions(mixture, config.data.num_streams)
    if before:
        begin, positions = before[-1]["step"], np.array(before[-1]["positions"], np.int64)
    streams = range(config.data.num_streams)
    bos_id, eos_id, seed = tokenizer.bos_id, tokenizer.eos_id, config.train.seed
    return begin, open_streams(mixture, tokenizer.encode_all, bos_id, eos_id, seed, streams, positions)


def check_same_everywhere(fingerprints: dict[str, str]) -> None:
    """InputError, on all processes, where one of them sees another corpus or tokenizer."""
    if jax.process_count() == 1:
        return
    for name, fingerprint in fingerprints.items():
        mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
        if len(np.unique(multihost_utils.process_allgather(mine), axis=0)) > 1:
            raise InputError(f"the processes see a different {name} each: data.corpus and train.run_dir must be shared")


def make_once(path: Path, make: Callable[[], Any]) -> None:
    """Process 0 makes what is not there yet; the others wait until it is."""
    once(lambda: None if path.exists() else make())
