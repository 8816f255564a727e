"""Traces of some steps for TensorBoard, XProf or Perfetto, and the program that they ran."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("ziggurat")


class Profiler:
    """Traces steps into a folder, and writes the optimized HLO of the step to train_step.txt there.

    Only process 0 traces: all run the same program, and traces of several processes in one folder would overwrite each
    other. The first and last traced steps, `first` and `last`, are 0 without a trace.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, done: int):
        self._folder = folder
        self._running = False
        self.first, self.last = (max(steps[0], done + 1), steps[1]) if steps else (0, 0)
        if self.first > self.last:
            log.warning("train.profile_steps = %s: the run has done %d steps, so nothing is traced", steps, done)
            self.first = self.last = 0

    def start(self, program: jax.stages.Compiled, state: Any) -> None:
        """Waits until the devices are idle, writes the step's program, and starts the trace."""
        if jax.process_index() > 0:
            return
        jax.block_until_ready(state)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "train_step.txt").write_text(program.as_text() or "")
        options = jax.profiler.ProfileOptions()
        # Python calls would slow the steps, and fill a trace that holds a million events.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._running = True

    def stop(self, say: Callable[[str], None] = log.info) -> None:
        """Writes the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self.first} to {self.last}, and their program: {self._folder}")
