"""Prepares a run before its first step: its folder, corpus, tokenizer and held-out documents."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from data.conversations import open_template, tokens_that_end
from data.errors import InputError
from data.files.atomic import atomic_file, unfinished
from data.files.json_file import read_small_file
from data.files.writable import why_not_writable
from data.formats.stdlib import snapshot_stdlib
from data.infilling import mark_names
from data.lengths import check_lengths
from data.mixture import Mixture, open_mixture, shares_of
from data.tokenizer.folder import holds_tokenizer, load_tokenizer, write_tokenizer
from data.tokenizer.tokenizer import FIM_TOKENS, TEMPLATE_FILE, Tokenizer
from data.tokenizer.training import train_tokenizer
from train.config.changes import changes_of, table
from train.config.config import Config, ResolvedConfig
from train.data_identity import ACCEPT, ANOTHER_RUN, RunInputs, check_same_everywhere, identity_of, log
from train.devices.collectives import on_first_process
from train.evaluation.documents import choose_held_out, take_bytes
from train.evaluation.tasks import open_tasks
from train.fork import check_fork, parent_of
from train.rollout.reward import Reward
from train.rollout.reward_model import RewardModel
from train.rollout.rollouts import Rollouts
from train.run.events import newest_saved_step, read_events, skipped_since_begin
from train.run.folder import HeldOutDocument, Run
from train.run.lease import Lease
from train.run.ledger import inherited_entries, read_ledger, skipped_batches, write_ledger
from train.run.run_name import split_name
from train.run.storage import check_writable
from train.run.trackers import foreign_settings, missing_packages
from train.stop import reset_watchdog

if TYPE_CHECKING:
    from data.formats.template import ChatTemplate

# Tokens of a sample that no evaluation waits long for.
LONG_SAMPLE = 1024


def prepare_run(
    config: Config, run: Run, lease: Lease, when_new: Callable[[Mixture], object] = lambda _: None
) -> RunInputs:
    """Takes the lease, and makes or finds everything that the first step needs. All processes call it together.

    Calls `when_new` with the corpora of a new run before what takes long: its tokenizer and its held-out documents.

    Raises InputError if the folder is not a run's, or config, corpus or tokenizer do not fit it or each other.
    """
    check_folder(config, run)
    asked = config.evaluation
    tasks = open_tasks(asked.tasks, asked.task_dir, asked.task_limit) if asked.tasks is not None else None
    if config.objective.samples and not config.objective.reward:
        # A config without one may be planned, as that of a run's folder, which is never asked for code.
        raise InputError(
            "objective.name = grpo needs a reward; give objective.reward=FILE.py:FUNCTION, such as "
            "rewards.py:is_right, or the RUN of a reward model"
        )
    function = Reward(config.objective) if config.objective.names_function else None
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
        when_new(mixture)
        on_first_process(lambda: claim(config, run, mixture))
    tokenizer = run_tokenizer(config, run, mixture)
    if config.data.fills_in:
        mark_names(config.data, tokenizer)
    if is_new:
        check_lengths(mixture, tokenizer)
    config = config.resolved(tokenizer.vocab_size)
    on_first_process(lambda: None if has_held_out(config, run) else save_held_out(config, run, mixture))
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
    rollouts = open_rollouts(config, tokenizer, function)
    if rollouts:
        rollouts.try_reward(held_out)
    return RunInputs(config, mixture, tokenizer, held_out, identity_of(config, mixture) | fingerprints, tasks, rollouts)


def open_rollouts(config: ResolvedConfig, tokenizer: Tokenizer, function: Reward | None) -> Rollouts | None:
    """Opens what samples a run's answers, if it has them, with their reward: a function, or a model."""
    if not config.objective.samples:
        return None
    assert config.objective.reward
    alive = partial(reset_watchdog, config)
    reward = function or RewardModel(config.objective.reward, config, tokenizer, alive)
    return Rollouts(config, tokenizer, reward, alive)


@contextmanager
def leaving_no_copy(run: Run) -> Iterator[None]:
    """Removes the copy of the default corpus, and its folders, if they were made within and the folder is no run's."""
    made = [path for path in (run.snapshot, run.snapshot.parent, run.folder) if not os.path.exists(path)]
    try:
        yield
    finally:
        # Another start may have the lease, and read the copy.
        if jax.process_index() == 0 and not any(map(os.path.exists, (run.config_file, run.lease))):
            for path in made:
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()


def check_folder(config: Config, run: Run) -> None:
    """Raises InputError if the folder cannot be used, or holds a run that this config would not continue."""
    if problem := why_not_writable(run.folder):
        raise InputError(f"train.run_dir = {run.folder}: {problem}; name another folder")
    if problems := missing_packages(config) + foreign_settings(config, run):
        raise InputError("\n".join(problems))
    check_files(run)
    parent = folder_of_parent(config)
    if parent and os.path.realpath(parent.folder) == os.path.realpath(run.folder):
        raise InputError(
            f"train.run_dir = {run.folder} is the run that train.init_from = {config.train.init_from} starts from; "
            "name a new folder with --config.train.run_dir=FOLDER"
        )
    last_step = run.last_step()
    is_ours = is_claimed(run)
    if is_ours:
        before, _ = Run.load(run.folder)
        if before.checkpoints != run.checkpoints and (newest := before.last_step() or 0) > (last_step or 0):
            raise InputError(
                f"checkpoint.dir: {run.folder} has saved its step {newest} in {before.checkpoints}, and "
                f"{run.checkpoints} has {f'step {last_step}' if last_step else 'nothing'}; move the checkpoints there, "
                "or give the old place"
            )
    on_first_process(lambda: check_writable(run.checkpoints))
    if is_ours:
        check_nothing_is_gone(run, last_step)
    if last_step is None:
        # A fork's is checked with its parent.
        if (source := tokenizer_source(config)) and not config.train.init_from:
            check_vocabulary(config, load_tokenizer(source))
        return
    if last_step == 0:
        raise InputError(
            f"train.run_dir = {run.folder} holds weights alone, from which another run can start: "
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


def check_files(run: Run) -> None:
    """Raises InputError if something else is where the run reads and writes its files.

    The run would wait for a pipe, and write wherever a link leads in a folder that came from somebody else.
    """
    for path in (run.config_file, run.lease, run.events, run.metrics, run.positions, run.recovery, run.held_out):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise InputError(f"{path} is no file of the run itself but a link, a folder or a device; move it away")


def check_nothing_is_gone(run: Run, last_step: int | None) -> None:
    """Raises InputError if the audit log knows of checkpoints or skipped batches, and there are none."""
    events = read_events(run.events)
    if last_step is None and (saved := newest_saved_step(events)):
        raise InputError(
            f"{run.checkpoints} holds no checkpoint, and the run in {run.folder} has saved its step {saved}; restore "
            f"or mount it, remove {run.folder} to begin again, or {ANOTHER_RUN}"
        )
    if last_step and skipped_since_begin(events) and not skipped_batches(read_ledger(run.recovery)):
        raise InputError(f"{run.recovery} is gone or empty, and the run has skipped batches; restore it from a copy")


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
    halves = {half for path in first for half in (*unfinished(path), path.with_name(path.name + ".partial"))}
    paths = set(run.folder.iterdir()) if run.folder.exists() else set()
    if paths - halves - {run.snapshot.parent, run.lease}:
        raise InputError(f"train.run_dir = {run.folder} holds other things than a run; name a new folder")
    return False


def check_not_imported(run: Run) -> None:
    """Raises InputError if the run holds imported or merged weights alone, without steps and data of its own."""
    if run.last_step() == 0:
        raise InputError(
            f"{run.folder} holds weights alone, which have no steps and no data; give a run begun with them"
        )


def claim(config: Config, run: Run, mixture: Mixture) -> None:
    """Makes the folder this run's, with a tokenizer, without what an earlier start without a checkpoint has left."""
    tokenizer_files = new_tokenizer(config, mixture)  # which may refuse the config
    run.save_config(config)
    shutil.rmtree(run.tokenizer, ignore_errors=True)
    write_tokenizer(tokenizer_files, run.tokenizer)
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
        on_first_process(lambda: None if run.snapshot.exists() else make())
        return str(run.snapshot)

    return open_mixture(config.resolved().data, stdlib, run.folder, run_template(config, run))


def run_template(config: Config, run: Run) -> "ChatTemplate | None":
    """Returns the template of the run's conversations: a new run's from its config, afterwards the run's own copy."""
    if not config.data.converses:
        return None
    if run.last_step() is not None and holds_tokenizer(run.tokenizer):
        template = open_template(replace(config.data, chat_template=None), load_tokenizer(run.tokenizer))
        file = Path(config.data.chat_template).expanduser() if config.data.chat_template else None
        if template and file and file.is_file() and read_small_file(file).decode(errors="replace") != template.source:
            raise InputError(
                f"data.chat_template = {config.data.chat_template} is not the template that the run in {run.folder} "
                f"began with; leave it at none, or {ANOTHER_RUN}"
            )
        return template
    source = tokenizer_source(config)
    return open_template(config.data, load_tokenizer(source) if source else None)


def folder_of_parent(config: Config) -> Run | None:
    """Returns the run whose checkpoint this one starts from, if there is one."""
    return Run(split_name(config.train.init_from)[0]) if config.train.init_from else None


def run_tokenizer(config: Config, run: Run, mixture: Mixture) -> Tokenizer:
    """Returns the run's tokenizer, which is made again if it is gone. InputError if `tokenizer.path` is another one."""

    def make() -> None:
        write_tokenizer(new_tokenizer(config, mixture), run.tokenizer)

    on_first_process(lambda: None if holds_tokenizer(run.tokenizer) else make())
    tokenizer = load_tokenizer(run.tokenizer)
    path = Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None
    if path and path.exists() and load_tokenizer(path).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"tokenizer.path = {path} is not the tokenizer that the run in {run.folder} began with; leave it at none"
        )
    return tokenizer


def new_tokenizer(config: Config, mixture: Mixture) -> Mapping[str, bytes]:
    """Returns the files of a new run's tokenizer: copied from its parent or `tokenizer.path`, or trained.

    Raises InputError if `tokenizer.path` has no tokenizer, or one that is too large for the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = tokenizer_source(config)
        tokenizer = load_tokenizer(source) if source else train_run_tokenizer(config, mixture, Path(folder))
        check_vocabulary(config, tokenizer)
        if config.data.fills_in:
            # The run's own copy names them, so that its exports do.
            tokenizer.fim_tokens = mark_names(config.data, tokenizer)
        template = open_template(config.data, tokenizer)
        if template is None:
            return tokenizer.files()
        if ends := [token for token in tokens_that_end(template, tokenizer) if token not in tokenizer.stop_ids]:
            stops = {"eos_token_id": [*tokenizer.stop_ids, *ends]}
            tokenizer.generation_config = {**tokenizer.generation_config, **stops}
        files = {name: content for name, content in tokenizer.files().items() if name != TEMPLATE_FILE}
        # The file that identifies a tokenizer comes last.
        return {TEMPLATE_FILE: template.source.encode(), **files}


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
    control_tokens = FIM_TOKENS if config.data.fills_in else ()
    return train_tokenizer(sample, config.tokenizer.vocab_size, folder, control_tokens)


def tokenizer_source(config: Config) -> Path | None:
    """Returns the folder of the tokenizer that a new run copies: that of its parent, or `tokenizer.path`."""
    if parent := folder_of_parent(config):
        return parent.tokenizer
    return Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises InputError if the model's vocabulary is too small for the tokenizer, or the tokenizer lacks marks."""
    if config.data.fills_in:
        mark_names(config.data, tokenizer)
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size} is less than the tokenizer's {tokenizer.vocab_size} pieces; "
            "raise it, or leave it at none"
        )


def has_held_out(config: Config, run: Run) -> bool:
    """True if the run's held-out documents are there; a file that is damaged or empty may be made again."""
    try:
        return bool(run.held_out_texts()) or (run.held_out.exists() and not config.data.validation_fraction)
    except InputError:
        log.warning("%s is damaged, and is made again", run.held_out)
        return False


def save_held_out(config: Config, run: Run, mixture: Mixture) -> None:
    """Chooses the held-out documents and writes them to the run's folder."""
    run.save_held_out(choose_held_out(mixture, config.evaluation.max_bytes))
