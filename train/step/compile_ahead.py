"""Compiles a run's programs in another thread, while the run prepares what they read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
from jax.sharding import Mesh


class CompileAhead:
    """One thread that compiles programs one after another: on a CPU, for one process.

    A compiler keeps one core busy for most of its time. For other devices it takes minutes, for which a process that
    meets an error in between would have to wait.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._begun: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def begin(self, compile_programs: Callable[[], object]) -> None:
        """Calls a function in the thread, if programs are compiled ahead at all.

        Its errors are left to whoever runs the programs, and compiles them again.
        """
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            self._begun.append(self._thread.submit(self._run, compile_programs))

    def wait(self) -> None:
        """Waits until everything that was begun is compiled."""
        wait(self._begun)

    def _run(self, compile_programs: Callable[[], object]) -> None:
        with jax.set_mesh(self._mesh):  # which each thread has for itself
            compile_programs()
