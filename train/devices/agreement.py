"""All-gathers a few scalars a step, so that all processes decide alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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
