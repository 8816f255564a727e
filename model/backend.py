"""The platform that a program is compiled for."""

import jax


def platform() -> str:
    """Returns cpu, gpu or tpu: the platform of the ambient mesh, or without one that of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name: str = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def on_one_cpu() -> bool:
    """Returns True where the ambient mesh is a single CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size == 1 and mesh.abstract_device is not None and platform() == "cpu"
