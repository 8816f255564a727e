"""What must stay the same about the data of a run, and where a resumed run continues in it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.config import PER_CORPUS_FIELDS
from data.errors import InputError
from data.mixture import MixedStream, Mixture, corpus_field, initial_positions, open_streams
from data.tokenizer.tokenizer import Tokenizer
from train.config.changes import Change, table
from train.config.config import Config, ResolvedConfig, config_fields
from train.devices.processes import on_first_process
from train.run.folder import HeldOutDocument, Run
from train.run.name import split_name
from train.run.step_log import read_steps

if TYPE_CHECKING:
    from train.evaluation.harness import Tasks
from train.evaluation.documents import choose_held_out

log = logging.getLogger("ziggurat")
ACCEPT = "accept the change of the data with --config.data.accept_changes=true"
ANOTHER_RUN = "start another run with --config.train.run_dir=FOLDER"


@dataclass(frozen=True)
class RunInputs:
    """What `prepare` finds or makes.

    Attributes:
        config: every derived field filled in.
        mixture: the text.
        tokenizer: of the run.
        held_out: the documents that it evaluates on at its end.
        identity: what the order of the data follows from, kept in each checkpoint.
        tasks: of lm-evaluation-harness, that it evaluates on.
    """

    config: ResolvedConfig
    mixture: Mixture
    tokenizer: Tokenizer
    held_out: list[HeldOutDocument]
    identity: dict[str, Any]
    tasks: "Tasks | None" = None


def identity_of(config: Config, mixture: Mixture) -> dict[str, Any]:
    """The settings that the order of the data follows from, by name (C1); beside them stand the fingerprints."""
    found = {
        f"data.{name}": getattr(config.data, name)
        for group, name, setting in config_fields()
        if group == "data" and setting.metadata.get("resume", "frozen") == "frozen"
    }
    for source in mixture.sources if isinstance(config.data.corpus, dict) else []:
        found[f"{corpus_field(source.name)}.weight"] = [list(stage) for stage in source.weights]
        for name in PER_CORPUS_FIELDS:
            found[f"{corpus_field(source.name)}.{name}"] = getattr(source.config, name)
    return found | {"train.seed": config.train.seed}


def continue_data(
    progress: Mapping[str, Any], prepared: RunInputs, trained: Path, instead: str = ANOTHER_RUN
) -> tuple[RunInputs, np.ndarray]:
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
        positions = initial_positions(prepared.mixture, config.data.num_streams, epoch)
    for source, epochs in zip(prepared.mixture.sources, positions[:, :, 0].min(axis=0).tolist(), strict=True):
        if source.config.epochs is not None and epochs >= source.config.epochs:
            raise InputError(
                f"{corpus_field(source.name)}: {epochs} epochs have been read before the change; give more than that "
                "(data.epochs), or leave it at none"
            )
    if moves:
        log.warning("the streams begin anew, with epoch %d, and other documents are held out", epoch)
        run = Run.of(config)
        on_first_process(lambda: run.save_held_out(choose_held_out(prepared.mixture, config.evaluation.max_bytes)))
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
    begin, positions = first_step(config), initial_positions(mixture, config.num_streams)
    if before:
        begin, positions = before[-1]["step"], np.array(before[-1]["positions"], np.int64)
    streams = range(config.num_streams)
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
