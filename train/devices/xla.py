"""What the compiler is told, by platform: the same where a run trains and where it is planned."""

from model.backend import platform

OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {
        # Else the compiler keeps all layers' weights in bfloat16, too, because each layer's use of them is.
        "xla_jf_bf16_propagation": False,
        # Else jax 0.10's sums the residuals of a single row whole, where they should be scattered over `tensor`.
        "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    },
    # Where a gathered array is cut to a device's own part again, XLA of jax 0.10 makes a permutation without pairs of
    # it, whose result is all zeros.
    "gpu": {"xla_disable_hlo_passes": "all-gather-to-collective-permute-simplifier"},
}


def compiler_options() -> dict[str, bool | str] | None:
    """What `jax.jit` takes for the devices of the ambient mesh; none: nothing special."""
    return OPTIONS.get(platform())
