"""Prepares a run before its first step: its folder, corpus, tokenizer and held-out documents."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from data.errors import InputError
from data.files.atomic import atomic_file, partial_of
from data.files.writable import why_not_writable
from data.formats.stdlib import snapshot_stdlib
from data.mixture import Mixture, open_mixture, shares_of
from data.tokenizer.folder import holds_tokenizer, load_tokenizer, write_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer
from train.config.changes import changes_of, table
from train.config.config import Config
from train.data_identity import ACCEPT, ANOTHER_RUN, RunInputs, check_same_everywhere, identity_of, log
from train.devices.collectives import on_first_process
from train.evaluation.documents import choose_held_out, take_bytes
from train.evaluation.tasks import open_tasks
from train.fork import check_fork, parent_of
from train.run.folder import HeldOutDocument, Run
from train.run.lease import Lease
from train.run.ledger import inherited_entries, read_ledger, write_ledger
from train.run.run_name import split_name
from train.run.storage import check_writable
from train.run.trackers import missing_packages

# Tokens of a sample that no evaluation waits long for.
LONG_SAMPLE = 1024


def prepare_run(config: Config, run: Run, lease: Lease) -> RunInputs:
    """Takes the lease, and makes or finds everything that the first step needs. All processes call it together.

    Raises InputError if the folder is not a run's, or config, corpus or tokenizer do not fit it or each other.
    """
    check_folder(config, run)
    asked = config.evaluation
    tasks = open_tasks(asked.tasks, asked.task_dir, asked.task_limit) if asked.tasks is not None else None
    mixture = open_run_mixture(config, run)
    # A run exists from its first checkpoint on. Whatever a start without one has left is made again.
    is_new = run.last_step() is None
    if is_new:
        for source in mixture.sources:
            source.corpus.check()
        if config.train.init_from:
            check_fork(config)
    on_first_process(lease.take)
    if is_new:
        on_first_process(lambda: claim(config, run))
    tokenizer = run_tokenizer(config, run, mixture)
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size} pieces; "
            "raise it, or leave it at none"
        )
    config = config.resolved(tokenizer.vocab_size)
    make_once(run.held_out, lambda: run.save_held_out(choose_held_out(mixture, config.evaluation.max_bytes)))
    held_out = run.held_out_texts()
    if config.data.validation_fraction and not held_out and jax.process_index() == 0:
        log.warning("no document is held out, so nothing is evaluated; raise data.validation_fraction, or give more")
    if config.evaluation.sample_tokens > max(config.data.segment_length, LONG_SAMPLE) and jax.process_index() == 0:
        log.warning(
            "evaluation.sample_tokens = %d is more than the %d positions of a segment; each evaluation waits for it",
            config.evaluation.sample_tokens,
            config.data.segment_length,
        )
    for problem in filter(None, (source.corpus.order_problem() for source in mixture.sources)):
        if jax.process_index() == 0:
            log.warning(problem)
    fingerprints = mixture.fingerprints() | {"tokenizer": tokenizer.fingerprint}
    check_same_everywhere(fingerprints)
    return RunInputs(config, mixture, tokenizer, held_out, identity_of(config, mixture) | fingerprints, tasks)


def check_folder(config: Config, run: Run) -> None:
    """Raises InputError if the folder cannot be used, or holds a run that this config would not continue."""
    if problem := why_not_writable(run.folder):
        raise InputError(f"train.run_dir = {run.folder}: {problem}; name another folder")
    if missing := missing_packages(config):
        raise InputError("\n".join(missing))
    parent = folder_of_parent(config)
    if parent and parent.folder.resolve() == run.folder.resolve():
        raise InputError(
            f"train.run_dir = {run.folder} is the run that train.init_from = {config.train.init_from} starts from; "
            "name a new folder with --config.train.run_dir=FOLDER"
        )
    last_step = run.last_step()
    if is_claimed(run):
        before, _ = Run.load(run.folder)
        if before.checkpoints != run.checkpoints and (newest := before.last_step() or 0) > (last_step or 0):
            raise InputError(
                f"checkpoint.dir: {run.folder} has saved its step {newest} in {before.checkpoints}, and "
                f"{run.checkpoints} has {f'step {last_step}' if last_step else 'nothing'}; move the checkpoints there, "
                "or give the old place"
            )
    on_first_process(lambda: check_writable(run.checkpoints))
    if last_step is None:
        return
    if last_step == 0:
        raise InputError(
            f"train.run_dir = {run.folder} holds imported weights, from which another run can start: "
            f"--config={run.folder}@0 --config.train.run_dir=FOLDER"
        )
    saved = run.load_config()
    changes = changes_of(saved, config.resolved(saved.model.vocab_size))
    accepts = config.data.accept_changes
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


def is_claimed(run: Run) -> bool:
    """True if the folder is a run's, even one that was killed as it began. InputError if it holds something else."""
    if run.config_file.exists():
        run.load_config()
        return True
    if run.last_step() is not None:
        raise InputError(
            f"train.run_dir = {run.folder}: checkpoints in {run.checkpoints}, but no config.json; restore it, or "
            "name other folders"
        )
    # A run writes its config before everything else except its copy of the default corpus and its lease.
    first = (run.config_file, run.lease)
    # Versions up to 0.7 named unfinished files with the second of these spellings.
    unfinished = {name for path in first for name in (partial_of(path).name, path.name + ".partial")}
    names = {path.name for path in run.folder.iterdir()} if run.folder.exists() else set()
    if names - unfinished - {run.snapshot.parent.name, run.lease.name}:
        raise InputError(f"train.run_dir = {run.folder} holds other things than a run; name a new folder")
    return False


def check_not_imported(run: Run) -> None:
    """Raises InputError if the run holds only imported weights, so it has neither steps nor data of its own."""
    if run.last_step() == 0:
        raise InputError(
            f"{run.folder} holds imported weights, which have no steps and no data; give a run begun with them"
        )


def claim(config: Config, run: Run) -> None:
    """Makes the folder this run's, and removes what an earlier start without a checkpoint has left."""
    run.save_config(config)
    shutil.rmtree(run.tokenizer, ignore_errors=True)
    run.held_out.unlink(missing_ok=True)
    run.recovery.unlink(missing_ok=True)
    if config.train.init_from and config.train.init_with == "all":
        # The data continues as the parent's does, without the batches that it skips.
        write_ledger(run.recovery, inherited_entries(read_ledger(parent_of(config).run.recovery)))


def open_run_mixture(config: Config, run: Run) -> Mixture:
    """Opens the corpora of the config; the default corpus is copied to the run's folder on first use."""

    def make() -> None:
        parent = folder_of_parent(config)
        if parent and parent.snapshot.exists():
            with atomic_file(run.snapshot) as partial:
                partial.write_text(parent.snapshot.read_text())
        else:
            snapshot_stdlib(run.snapshot)

    def stdlib() -> str:
        make_once(run.snapshot, make)
        return str(run.snapshot)

    return open_mixture(config.resolved().data, stdlib, leave_out=run.folder)


def folder_of_parent(config: Config) -> Run | None:
    """Returns the run whose checkpoint this one starts from, if there is one."""
    return Run(split_name(config.train.init_from)[0]) if config.train.init_from else None


def run_tokenizer(config: Config, run: Run, mixture: Mixture) -> Tokenizer:
    """Returns the run's tokenizer: its own, or a copy of its parent's or of `tokenizer.path`, or a new one.

    Raises InputError if `tokenizer.path` has no tokenizer, or another one than the run began with.
    """
    path = Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None

    def make() -> None:
        parent = folder_of_parent(config)
        if source := parent.tokenizer if parent else path:
            write_tokenizer(load_tokenizer(source).files(), run.tokenizer)
        else:
            train_run_tokenizer(config, mixture, run.tokenizer)

    on_first_process(lambda: None if holds_tokenizer(run.tokenizer) else make())
    tokenizer = load_tokenizer(run.tokenizer)
    if path and path.exists() and load_tokenizer(path).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"tokenizer.path = {path} is not the tokenizer that the run in {run.folder} began with; leave it at none"
        )
    return tokenizer


def train_run_tokenizer(config: Config, mixture: Mixture, folder: Path) -> Tokenizer:
    """Trains the tokenizer of the config on a bounded sample of the training documents.

    Each corpus of a mixture contributes by its first weight above 0.
    """
    log.info("training a tokenizer of %d pieces", config.tokenizer.vocab_size)
    sample: list[str] = []
    shares = shares_of([next(weight for _, weight in source.weights if weight) for source in mixture.sources])
    for source, share in zip(mixture.sources, shares, strict=True):
        texts = source.corpus.training_texts(config.train.seed)
        size = config.tokenizer.sample_bytes * share // sum(shares)
        sample += [text.text for text in take_bytes(map(HeldOutDocument, texts), size)] if size else []
    return train_tokenizer(sample, config.tokenizer.vocab_size, folder)


def make_once(path: Path, make: Callable[[], Any]) -> None:
    """Calls `make` on process 0 unless the path exists; the other processes wait."""
    on_first_process(lambda: None if path.exists() else make())
