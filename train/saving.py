"""Saves of a run: checkpoints of its state, and the log of its positions in the data."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.loader import gather_positions
from train.checkpoint.checkpoint import Checkpoints
from train.checkpoint.replicas import check_replicas, is_finite
from train.data_identity import data_fingerprint
from train.devices.collectives import all_gather_json
from train.run.events import Events
from train.run.ledger import Ledger
from train.run.step_log import StepLog
from train.step.spike_detector import Anomaly, SpikeDetector
from train.step.state import State


@dataclass(frozen=True)
class Saver:
    """Saves the state of one pass of training, from a restored step on.

    The history of the spike detector is saved with the state. Process 0 alone has logs.
    """

    checkpoints: Checkpoints
    events: Events
    ledger: Ledger
    detector: SpikeDetector
    identity: dict[str, Any]
    position_log: StepLog | None
    step_log: StepLog | None

    def save(self, step: int, state: State, positions: np.ndarray, is_over: bool) -> None:
        """Saves a checkpoint, with this process's positions in the data; all processes call it together.

        Raises:
            Anomaly: the state is not finite.
            Fault: replicas of the state differ.
        """
        self.events.account.switch_to("checkpoint")
        begun = time.perf_counter()
        if not all(all_gather_json(bool(is_finite(state)))):
            raise Anomaly(step, "its weights or optimizer state are not finite")
        check_replicas(state)
        all_positions = gather_positions(positions).tolist()
        self.log_positions(step, all_positions)
        history = [list(pair) for pair in self.detector.history]
        for log in (self.position_log, self.step_log):
            if log:
                log.sync()
        progress = {"positions": all_positions, "identity": self.identity, "is_over": is_over, "history": history}
        self.checkpoints.save(state, progress)
        stall = round(time.perf_counter() - begun, 3)
        self.events.account.mark_saved()
        self.ledger.mark_saved()
        self.events.write("save", step=step, stall_seconds=stall)
        self.events.account.switch_to("steps")

    def log_positions(self, step: int, positions: list[Any]) -> None:
        """Writes the positions of all streams after a step to positions.jsonl."""
        if self.position_log:
            record = {"step": step, "data": data_fingerprint(self.identity), "positions": positions}
            self.position_log.write(record)
