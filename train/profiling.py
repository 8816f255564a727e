"""A trace of some steps for TensorBoard, XProf or Perfetto, and the program that they ran."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("ziggurat")


class Profiler:
    """Traces steps into a folder, and writes the compiled step's optimized HLO beside it as train_step.txt.

    Process 0 alone traces: all run the same program, and traces of several in one folder would take each other's place.

    Args:
        folder: of the traces; each has a folder with its date below `plugins/profile`.
        steps: the first and the last that are traced; none: nothing is.
        done: steps that the run has behind it: they are not traced any more.

    `first` and `last` are the steps that are traced; 0 where there are none.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, done: int):
        self._folder, self._running = folder, False
        self.first, self.last = (max(steps[0], done + 1), steps[1]) if steps else (0, 0)
        if self.first > self.last:
            log.warning("train.profile_steps = %s: the run has done %d steps, so nothing is traced", steps, done)
            self.first = self.last = 0

    def start(self, program: jax.stages.Compiled, state: Any) -> None:
        """Before the first step: wait for the devices to be idle, write the step's program, and begin."""
        if jax.process_index() > 0:
            return
        jax.block_until_ready(state)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "train_step.txt").write_text(program.as_text() or "")
        options = jax.profiler.ProfileOptions()
        # Calls of Python functions would slow what is measured, and crowd a trace that has room for a million events.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._running = True

    def stop(self, say: Callable[[str], None] = log.info) -> None:
        """Write the trace, where one goes on, once the last step is finished."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self.first} to {self.last}, and their program: {self._folder}")
