"""The platform that a program is compiled for."""

import jax


def platform() -> str:
    """Returns cpu, gpu or tpu: the platform of the ambient mesh, or without one that of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name: str = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name
