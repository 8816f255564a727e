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
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, done: int):
        self._folder, self._running = folder, False
        self._first, self.last = (max(steps[0], done + 1), steps[1]) if steps else (0, 0)
        if steps and done >= self.last:
            log.warning("train.profile_steps = %s: the run has done %d steps, so nothing is traced", steps, done)

    def start(self, step: int, train_step: Any, state: Any, batch: Any) -> None:
        """Before each step; at the first one wait until the devices are idle, write the program, and begin."""
        if step != self._first or step > self.last or jax.process_index() > 0:
            return
        jax.block_until_ready(state)
        self._folder.mkdir(parents=True, exist_ok=True)
        # The step is compiled here where it has not been: the trace is of its work alone.
        (self._folder / "train_step.txt").write_text(train_step.lower(state, batch).compile().as_text())
        options = jax.profiler.ProfileOptions()
        # Calls of Python functions would slow what is measured, and crowd a trace that has room for a million events.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._running = True

    def stop(self, say: Callable[[str], None] = log.info) -> None:
        """Write the trace, where one goes on. The last traced step must be finished."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self._first} to {self.last}, and their program: {self._folder}")
