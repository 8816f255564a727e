"""The identity of a run's data, which must stay the same, and where a resumed run continues in it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from data.config import CONVERSATION_FIELDS, FIM_FIELDS, PAIR_FIELDS, PER_CORPUS_FIELDS
from data.errors import InputError
from data.mixture import MixedStream, Mixture, corpus_field, initial_positions, open_streams
from data.tokenizer.tokenizer import Tokenizer
from train.config.changes import Change, table
from train.config.config import Config, ResolvedConfig, config_fields
from train.devices.collectives import all_gather_json, on_first_process
from train.run.folder import HeldOutDocument, Run
from train.run.run_name import split_name
from train.run.step_log import read_positions

if TYPE_CHECKING:
    from train.evaluation.harness import Tasks
    from train.rollout.rollouts import Rollouts
from train.evaluation.documents import choose_held_out

log = logging.getLogger("ziggurat")
ACCEPT = "accept the change of the data with --config.data.accept_changes=true"
ANOTHER_RUN = "start another run with --config.train.run_dir=FOLDER"


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, which `prepare_run` finds or makes."""

    config: ResolvedConfig
    mixture: Mixture
    tokenizer: Tokenizer
    held_out: list[HeldOutDocument]
    identity: dict[str, Any]  # settings and fingerprints that the order of the data follows from
    tasks: "Tasks | None" = None
    rollouts: "Rollouts | None" = None


def identity_of(config: Config, mixture: Mixture) -> dict[str, Any]:
    """Returns the settings that the order of the data follows from (C1); fingerprints are added to them.

    Those of fill-in-the-middle, of conversations, of pairs and of shuffled rows are among them where they are used, so
    that runs from before there were any can go on.
    """
    unused: set[str] = set() if config.data.fills_in else {*FIM_FIELDS}
    unused |= set() if config.data.shuffle_rows else {"shuffle_rows"}
    unused |= set() if config.data.converses else {*CONVERSATION_FIELDS}
    unused |= set() if config.data.compares else {*PAIR_FIELDS}
    identity = {
        f"data.{name}": getattr(config.data, name)
        for group, name, field in config_fields()
        if group == "data" and field.metadata["resume"] == "frozen" and name not in unused
    }
    for source in mixture.sources if isinstance(config.data.corpus, dict) else []:
        identity[f"{corpus_field(source.name)}.weight"] = [list(stage) for stage in source.weights]
        for name in sorted({*PER_CORPUS_FIELDS} - unused):
            identity[f"{corpus_field(source.name)}.{name}"] = getattr(source.config, name)
    return identity | {"train.seed": config.train.seed}


def continue_data(
    progress: Mapping[str, Any], inputs: RunInputs, trained: Path, instead: str = ANOTHER_RUN
) -> tuple[RunInputs, np.ndarray]:
    """Returns the inputs and positions to continue with: where the checkpoint was, or a new epoch of changed data.

    Changed data has other held-out documents, too. All processes call it together.

    Args:
        trained: folder of the run that saved the checkpoint.
        instead: remedy for changed data other than accepting it.

    Raises:
        InputError: corpus, tokenizer or data settings are not those of the checkpoint, and `data.accept_changes` is
            false; or all epochs of the changed data have been read.
    """
    if "identity" not in progress:
        raise InputError(f"{trained} was begun by an older version; start another run")
    saved = progress["identity"]
    now = inputs.identity
    config = inputs.config
    positions = np.array(progress["positions"], np.int64)
    changes = [Change(name, saved.get(name), now.get(name)) for name in saved | now if saved.get(name) != now.get(name)]
    if not changes:
        return inputs, positions
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
        positions = initial_positions(inputs.mixture, config.data.num_streams, epoch)
    for source, epochs in zip(inputs.mixture.sources, positions[:, :, 0].min(axis=0).tolist(), strict=True):
        if source.config.epochs is not None and epochs >= source.config.epochs:
            raise InputError(
                f"{corpus_field(source.name)}: {epochs} epochs have been read before the change; give more than that "
                "(data.epochs), or leave it at none"
            )
    if moves:
        log.warning("the streams start over with epoch %d, and other documents are held out", epoch)
        run = Run.from_config(config)
        on_first_process(lambda: run.save_held_out(choose_held_out(inputs.mixture, config.evaluation.max_bytes)))
        inputs = replace(inputs, held_out=run.held_out_texts())
    return inputs, positions


def data_fingerprint(identity: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of `RunInputs.identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def first_step(config: Config) -> int:
    """Returns the step (from 0) that reads the beginning of the data; not 0 in a fork with the optimizer alone."""
    if config.train.init_from and config.train.init_with == "optimizer":
        return split_name(config.train.init_from)[1] or 0
    return 0


def streams_before(
    step: int, config: Config, run: Run, mixture: Mixture, tokenizer: Tokenizer
) -> tuple[int, dict[int, MixedStream]]:
    """Returns (s, all streams at the start of the batch of step s), for the newest logged s up to `step`.

    Raises InputError if the run has read other data around this step than its config and corpus describe now.
    """
    positions = initial_positions(mixture, config.num_streams)
    logged = read_positions(run.positions, positions.shape)
    identity = identity_of(config, mixture) | mixture.fingerprints() | {"tokenizer": tokenizer.fingerprint}
    before = [record for record in logged if record["step"] <= step]
    if any(record["data"] != data_fingerprint(identity) for record in before[-1:] or logged[:1]):
        raise InputError(
            f"the data that {run.folder} read in step {step + 1} is not what its corpus, tokenizer and data settings "
            "are now; restore them"
        )
    begin = first_step(config)
    if before:
        begin = before[-1]["step"]
        positions = np.array(before[-1]["positions"], np.int64)
    numbers = range(config.num_streams)
    return begin, open_streams(mixture, tokenizer, tokenizer.encode_all, config.train.seed, numbers, positions)


def check_same_everywhere(fingerprints: dict[str, str]) -> None:
    """Raises InputError on all processes if one of them has another corpus or tokenizer."""
    for name, fingerprint in fingerprints.items():
        if len(set(all_gather_json(fingerprint))) > 1:
            raise InputError(f"the processes see a different {name} each: data.corpus and train.run_dir must be shared")
