"""Steps in flight: dispatched to the devices, with figures that the host has not read yet."""

import collections
import time
from typing import Any

import jax
import numpy as np

from train.data_identity import RunInputs
from train.devices.agreement import Agreement
from train.display import Rate
from train.run.step_log import trained_tokens
from train.step.flops import memory_bytes
from train.step.schedule import batch_size, rows_between
from train.step.spike_detector import SpikeDetector


class InFlight:
    """The dispatched steps of a run, oldest first.

    There are never more than two, so that the devices always have work while the host logs the step before. The share
    of the devices' peak that one token a second takes is `flops_share`. They are the steps after `step`, and the run
    is expected to end with `last_step`.
    """

    def __init__(
        self,
        inputs: RunInputs,
        agreement: Agreement,
        detector: SpikeDetector,
        step: int,
        last_step: int,
        flops_share: float,
    ):
        self._config = inputs.config
        self._mixture = inputs.mixture
        self._agreement = agreement
        self._detector = detector
        self._flops_share = flops_share
        self._rows_left = rows_between(self._config, step, last_step)
        # Number, metrics and reports of each step, still computed by the devices.
        self._steps: collections.deque[tuple[int, Any, jax.Array]] = collections.deque()
        self.rate = Rate()
        self.rate.start()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, metrics: Any, report: list[float]) -> None:
        """Adds a step that was just dispatched, and sends this process's report on it to the others.

        A report is 1 if this process was asked to stop, its seconds of waiting for data, and its busy seconds.
        """
        reports = self._agreement.send(report, [metrics["loss"], metrics["grad_norm"]])
        self._steps.append((step, metrics, reports))

    def finish_oldest(self) -> tuple[dict[str, Any], bool]:
        """Waits for the oldest step; returns (its line of metrics.jsonl, True to stop). Raises Anomaly for a spike."""
        step, metrics, reports = self._steps.popleft()
        figures: dict[str, Any] = jax.tree.map(lambda x: x.tolist(), jax.device_get(metrics))
        asked, waited, busy, *seen = self._agreement.read(reports).T
        record = {"step": step, "time": round(time.time(), 3)} | figures
        # A non-finite figure on any process counts for all. Outliers are judged by the figures of process 0.
        seen_by_process = np.transpose(seen).tolist()
        record |= dict(zip(("loss", "grad_norm"), seen_by_process[0], strict=True))
        shares = self._mixture.shares
        new_data = step > 1 and shares(step - 1) != shares(step - 2)
        self._detector.check(record, seen_by_process, new_data)
        if not record["loss_weight"]:
            record |= {"loss": None, "grad_norm": None}
        rows = batch_size(self._config, step - 1)
        self._rows_left = max(self._rows_left - rows, 0)
        positions = rows * self._config.data.segment_length
        self.rate.finished(positions, is_computed=record["loss_weight"] > 0)
        record |= {
            "utilization": trained_tokens(record) / positions,
            "tokens_per_second": self.rate.tokens_per_second,
            "peak_share": self.rate.tokens_per_second * self._flops_share,
            "data_wait_seconds": float(waited.max()),
            "memory_bytes": memory_bytes(),
        }
        if len(busy) > 1:
            slowest = int(busy.argmax())  # the other processes wait for this one
            record |= {
                "slowest_process": slowest, "slowest_process_seconds": float(busy[slowest]),
                "slowest_process_data_wait_seconds": float(waited[slowest]),
            }  # fmt: skip
        return record, bool(asked.any())

    def seconds_left(self) -> float:
        """Returns the seconds until the run's last step at the current rate."""
        return self.rate.seconds(self._rows_left * self._config.data.segment_length)
