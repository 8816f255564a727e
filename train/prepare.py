"""What a run stands on before its first step: a folder of its own, its text, its tokenizer, what it holds out."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.corpus import Corpus, open_corpus
from data.errors import InputError
from data.formats.stdlib import snapshot_stdlib
from data.tokenizer import MODEL_FILE, Tokenizer, copy_tokenizer, train_tokenizer
from train.config import Config, resume_differences
from train.mesh import once
from train.run import Run

log = logging.getLogger("ziggurat")


@dataclass(frozen=True)
class Prepared:
    """What `prepare` finds or makes.

    Attributes:
        config: every derived field filled in.
        corpus: the text.
        tokenizer: of the run.
        held_out: the documents that it evaluates on at its end.
        fingerprints: of corpus and tokenizer, kept in each checkpoint.
    """

    config: Config
    corpus: Corpus
    tokenizer: Tokenizer
    held_out: list[str]
    fingerprints: dict[str, str]


def prepare(config: Config, run: Run) -> Prepared:
    """Make or find everything in the run's folder that the first step needs. All processes call it together.

    Raises:
        InputError: the folder is something else's, or config, corpus or tokenizer don't fit it or each other.
    """
    check_folder(config, run)
    corpus = open_run_corpus(config, run)
    # A run begins with its first checkpoint. What a start without one has left is made anew.
    if not run.last_step():
        corpus.check()
        once(lambda: claim(config, run))
    tokenizer = run_tokenizer(config, run, corpus)
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size = {given} is less than the tokenizer's {tokenizer.vocab_size} pieces; "
            "raise it, or leave it at none"
        )
    config = config.resolved(tokenizer.vocab_size)
    size = config.evaluation.max_bytes
    make_once(run.held_out, lambda: run.save_held_out(up_to(corpus.held_out_texts(), size)))
    held_out = run.held_out_texts()
    if config.data.validation_fraction and not held_out and jax.process_index() == 0:
        log.warning("no document is held out, so nothing is evaluated; raise data.validation_fraction, or give more")
    fingerprints = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    check_same_everywhere(fingerprints)
    return Prepared(config, corpus, tokenizer, held_out, fingerprints)


def check_folder(config: Config, run: Run) -> None:
    """InputError where the folder cannot be, holds something else, or a run that this config would not continue."""
    existing = next(path for path in (run.folder.absolute(), *run.folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        raise InputError(f"train.run_dir = {run.folder}: {existing} {problem}; name another folder")
    if config.train.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError("train.tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'")
    last_step = run.last_step()
    if not run.is_claimed() or not last_step:
        return
    saved = run.load_config()
    differences = resume_differences(saved, config.resolved(saved.model.vocab_size))
    if differences["frozen"]:
        changes = "\n".join(f"  {line}" for line in differences["frozen"])
        raise InputError(
            f"{run.folder} holds a run with other settings, which cannot change on resume:\n{changes}\n"
            "  give the old values, or start another run with --config.train.run_dir=FOLDER"
        )
    if config.train.num_steps < last_step:
        raise InputError(
            f"train.num_steps = {config.train.num_steps}: the run in {run.folder} has done {last_step} steps already; "
            "raise it, or start another run with --config.train.run_dir=FOLDER"
        )
    for line in differences["warn"]:
        log.warning("changed on resume: %s", line)


def claim(config: Config, run: Run) -> None:
    """Make the folder this run's, and empty of what an earlier start has left."""
    run.save_config(config)
    run.clear()


def open_run_corpus(config: Config, run: Run) -> Corpus:
    """The corpus that the config names; the default one is kept in the run's folder on first use."""
    path = config.data.corpus
    if path == "stdlib":
        path = str(run.snapshot)
        make_once(run.snapshot, lambda: snapshot_stdlib(run.snapshot))
    return open_corpus(path, config.resolved().data, leave_out=run.folder)


def run_tokenizer(config: Config, run: Run, corpus: Corpus) -> Tokenizer:
    """The run's tokenizer: what is there, else a copy of `tokenizer.path`, else a new one trained on a sample.

    Raises:
        InputError: `tokenizer.path` has none, or another than the run began with.
    """
    path = Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None

    def make() -> None:
        if path:
            copy_tokenizer(Tokenizer.load(path), run.tokenizer)
        else:
            train_run_tokenizer(config, corpus, run.tokenizer)

    make_once(run.tokenizer / MODEL_FILE, make)
    tokenizer = Tokenizer.load(run.tokenizer)
    if path and path.exists() and Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"tokenizer.path = {path} is not the tokenizer that the run in {run.folder} began with; leave it at none"
        )
    return tokenizer


def train_run_tokenizer(config: Config, corpus: Corpus, folder: Path) -> Tokenizer:
    """Train the tokenizer that the config asks for on a bounded sample of the corpus's training documents."""
    log.info("training a tokenizer of %d pieces", config.tokenizer.vocab_size)
    sample = up_to(corpus.training_texts(config.train.seed), config.tokenizer.sample_bytes)
    return train_tokenizer(sample, config.tokenizer.vocab_size, folder)


def up_to(texts: Iterable[str], size: int) -> list[str]:
    """The first texts, of `size` bytes in all; the last is cut where it is longer."""
    taken: list[str] = []
    for text in texts:
        encoded = text.encode()
        if len(encoded) >= size:
            cut = encoded[:size].decode(errors="ignore")
            return [*taken, cut] if cut else taken
        taken.append(text)
        size -= len(encoded)
    return taken


def check_fingerprints(saved: dict[str, str], now: dict[str, str], config: Config) -> None:
    """InputError where the corpus or the tokenizer is not what the checkpoint was trained on."""
    if saved["corpus"] != now["corpus"]:
        raise InputError(
            f"data.corpus = {config.data.corpus} is not the text that this run began with (its fingerprint was "
            f"{saved['corpus'][:12]}, now it is {now['corpus'][:12]}); restore it, or start another run with "
            "--config.train.run_dir=FOLDER"
        )
    if saved["tokenizer"] != now["tokenizer"]:
        raise InputError(f"{config.train.run_dir}/tokenizer is not the one that this run began with; restore it")


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
