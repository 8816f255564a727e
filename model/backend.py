"""The platform of the ambient mesh."""

import jax


def platform() -> str:
    """Of the ambient mesh's devices, or else of this process's: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found: str = jax.default_backend() if device is None else device.platform
    return "gpu" if found == "cuda" else found


def on_one_cpu() -> bool:
    """Whether the ambient mesh is a single CPU: there a program may be larger, if that makes it faster."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == 1 and mesh.abstract_device is not None and platform() == "cpu"
