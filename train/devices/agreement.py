"""All-gathers a few scalars a step, so that all processes take the same decisions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """All-gathers scalars of each process asynchronously, so that all take the same decision at the same step.

    It is made under the run's mesh. Sending is a small program next to the step's own; it waits for nothing.
    """

    def __init__(self) -> None:
        devices = sorted(jax.sharding.get_mesh().devices.flat, key=lambda device: (device.process_index, device.id))
        processes = [device.process_index for device in devices]
        self._rows = [processes.index(process) for process in sorted(set(processes))]
        if jax.default_backend() != "cpu":
            # One device of each process is enough; but CPUs keep the order only of programs that all devices share.
            devices = [devices[i] for i in self._rows]
            self._rows = [*range(len(devices))]
        self._mesh = Mesh(np.array(devices), "device")
        each = PartitionSpec("device")
        everywhere = PartitionSpec()

        def joined(numbers: jax.Array, figures: Sequence[jax.Array]) -> jax.Array:
            return jnp.concatenate([numbers, *(x.reshape(1, 1) for x in figures)], axis=1)

        # Each device sends its own copy of a figure, in case they differ.
        of_each = jax.shard_map(joined, mesh=self._mesh, in_specs=(each, everywhere), out_specs=each, check_vma=False)
        self._share = jax.jit(of_each, out_shardings=NamedSharding(self._mesh, everywhere))

    def send(self, numbers: Sequence[float], figures: Sequence[jax.Array] = ()) -> jax.Array:
        """Starts to all-gather the scalars of this process; see `read`.

        Args:
            numbers: scalars that the host knows.
            figures: scalars that may still be computed; every device has a copy.
        """
        mine = self._mesh.local_devices
        copies = [[shard.data for shard in x.addressable_shards if shard.device in mine] for x in figures]
        own = [jax.device_put(np.array([numbers], np.float32), device) for device in mine]
        with jax.set_mesh(self._mesh):
            return self._share(
                self._all((self._mesh.size, len(numbers)), PartitionSpec("device"), own),
                [self._all((), PartitionSpec(), copy) for copy in copies],
            )

    def read(self, sent: jax.Array) -> np.ndarray:
        """Waits for what `send` has started; returns float32 [processes, numbers and figures]."""
        return np.asarray(sent)[self._rows]

    def _all(self, shape: tuple[int, ...], spec: PartitionSpec, own: list[jax.Array]) -> jax.Array:
        """Joins the shards of each device to one array."""
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self._mesh, spec), own)
