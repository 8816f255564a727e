"""Ending early, and well: a signal asks, all processes agree, the run saves and says so.

The status of a process that was asked to end is 75 (sysexits' EX_TEMPFAIL): start it again at once.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import Config

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run has ended before its last step because it was asked to; what it has done is saved.

    Attributes:
        step: the last that is done.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopSignals:
    """SIGTERM and SIGINT while this is entered: the first is noted where someone will look, the next ends the process.

    A thread of its own hears them, so that they count while the main thread waits for devices or other processes.

    Attributes:
        asked: whether a signal has come.
        noted: whether the first is only noted. Before training begins there is nothing to save, so it ends at once.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None):
        self.asked = self.noted = False
        self._say = say

    def __enter__(self) -> "StopSignals":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._told.close()
        self._thread.join()
        self._heard.close()

    def _listen(self) -> None:
        while received := self._heard.recv(1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if self.asked or not self.noted:
                print(f"ziggurat: {name}: ended at once; the same command goes on", file=sys.stderr, flush=True)
                os._exit(PREEMPTED)
            self.asked = True
            self._say(f"{name}: stopping after this step; once more ends it at once")


class Agreement:
    """What each process has to say of a step, known to all of them: they decide the same, at the same step.

    Made under the run's mesh.

    Sending is one small program beside the step's own; it waits for nothing.
    """

    def __init__(self) -> None:
        devices = sorted(jax.sharding.get_mesh().devices.flat, key=lambda device: (device.process_index, device.id))
        processes = [device.process_index for device in devices]
        self._rows = [processes.index(process) for process in sorted(set(processes))]
        if jax.default_backend() != "cpu":
            # One of each process is enough. But a CPU keeps the order only of programs that all its devices share.
            devices = [devices[i] for i in self._rows]
            self._rows = [*range(len(devices))]
        self._mesh = Mesh(np.array(devices), "device")
        each, everywhere = PartitionSpec("device"), PartitionSpec()

        def joined(numbers: jax.Array, figures: Sequence[jax.Array]) -> jax.Array:
            return jnp.concatenate([numbers, *(x.reshape(1, 1) for x in figures)], axis=1)

        # Each device's own copy of a figure, should they differ.
        of_each = jax.shard_map(joined, mesh=self._mesh, in_specs=(each, everywhere), out_specs=each, check_vma=False)
        self._share = jax.jit(of_each, out_shardings=NamedSharding(self._mesh, everywhere))

    def send(self, numbers: Sequence[float], figures: Sequence[jax.Array] = ()) -> Any:
        """What this process knows → what all know, on its way: see `read`.

        Args:
            numbers: of the host.
            figures: scalars that are still computed; every device has a copy.
        """
        mine = self._mesh.local_devices
        copies = [[shard.data for shard in x.addressable_shards if shard.device in mine] for x in figures]
        own = [jax.device_put(np.array([numbers], np.float32), device) for device in mine]
        with jax.set_mesh(self._mesh):
            return self._share(
                self._all((self._mesh.size, len(numbers)), PartitionSpec("device"), own),
                [self._all((), PartitionSpec(), copy) for copy in copies],
            )

    def read(self, sent: Any) -> np.ndarray:
        """Float32 [processes, numbers and figures]. It waits for them."""
        return np.asarray(sent)[self._rows]

    def _all(self, shape: tuple[int, ...], spec: PartitionSpec, own: list[jax.Array]) -> jax.Array:
        """One array of what each device has of it."""
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self._mesh, spec), own)


def still_alive(config: Config) -> None:
    """Unless this is called again in time, the process shows where all its threads stand and ends with status 1.

    A collective that waits for a process that is no more, or a dead file system, would wait for ever.
    """
    if config.train.watchdog_seconds:
        # To the descriptor: what stands for standard error may be no file.
        faulthandler.dump_traceback_later(config.train.watchdog_seconds, exit=True, file=2)
