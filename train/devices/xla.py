"""Compiler options by platform or chip, used alike to train and to plan, and one runtime workaround."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from model.backend import platform
from train.devices.hardware import Chip, chip_of

# Gathers and sums are started on the SparseCores, which a v5p and a v6e also have, and run while the TensorCores
# compute. Without it theirs are synchronous: on a v5p a step of GPT-3 with `tensor` waits for a quarter of it.
SPARSE_CORES: dict[str, bool | str] = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
# Gathers over all chips of a 3D torus, which run around its three dimensions.
AROUND_THREE_DIMENSIONS: dict[str, bool | str] = {
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
}
# By platform, and by chip.
OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {
        # Otherwise the compiler also keeps all layers' weights in bfloat16, because every layer uses them so.
        "xla_jf_bf16_propagation": False,
        # Otherwise jax 0.10 all-reduces the residuals of a single row that should be reduce-scattered over `tensor`.
        "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    },
    # XLA of jax 0.10 turns an all-gather whose result is sliced back to the device's own shard into a
    # collective-permute without pairs, which returns zeros.
    "gpu": {"xla_disable_hlo_passes": "all-gather-to-collective-permute-simplifier"},
    "v5p": SPARSE_CORES | AROUND_THREE_DIMENSIONS,
    # A v6e has 128 MiB of vector memory. By default a program uses 16, which hold only small tiles of a product. With
    # 96 a step takes a quarter less time, and four times as long to compile.
    "v6e": SPARSE_CORES | {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    # A TPU7x has 64 MiB for each device. With 60 a product of 8,192 or 16,384 takes 13% or 9% fewer cycles. Its
    # SparseCores send without being asked.
    "tpu7x": {"xla_tpu_scoped_vmem_limit_kib": "61440"},
}
# libtpu 0.0.50 makes such a gather a sum of zeros, of twice the bytes, if there are several groups (its
# `ReplicaGroupsOn3DPlane`). Several slices are several groups only until a later pass leaves each slice its own; so
# nothing is lost without the pass that makes it a sum. The SparseCores would have carried out the sum.
WHOLE_SLICE_GATHERS = AROUND_THREE_DIMENSIONS | {"xla_disable_hlo_passes": "all_gather_decomposer"}
CHIPS_OF_CUBES = ("v5p", "tpu7x")


def compiler_options() -> dict[str, bool | str] | None:
    """Returns the `compiler_options` of `jax.jit` for the ambient mesh's devices, or None for the defaults."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    chip = chip_of(device.device_kind if device else jax.devices()[0].device_kind)
    name = chip.name if chip else ""
    of_slices = WHOLE_SLICE_GATHERS if name in CHIPS_OF_CUBES and mesh.shape.get("slice", 1) > 1 else {}
    return OPTIONS.get(platform(), {}) | OPTIONS.get(name, {}) | of_slices or None


def sparse_cores_send(chip: Chip) -> bool:
    """True for chips whose SparseCores carry out the collectives."""
    return chip.name == "tpu7x" or SPARSE_CORES.items() <= OPTIONS.get(chip.name, {}).items()


def one_time_options() -> dict[str, bool | str | int] | None:
    """Returns the `compiler_options` of a program that runs once.

    On CPUs LLVM takes 5 s to unroll the random numbers of 5 million initial weights, and 1.5 s at this level. Integers
    and single products have the same bits.
    """
    # Tests switch off all optimizations, which is faster still.
    if platform() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
        return {"xla_backend_optimization_level": 1}
    return None


def sum_loss_weights(batch: Mapping[str, jax.Array]) -> tuple[Mapping[str, jax.Array], jax.Array]:
    """Returns the batch and the sum of its loss weights, without a deadlock on CPU devices.

    The CPU runtime of jax 0.12 starts independent operations in any order on each device. One device may enter this
    all-reduce while another enters a collective of the accumulation loop, and both wait forever. On CPUs the tokens
    therefore depend on the sum, so that everything else follows it. Their values do not change.
    """
    total = jnp.sum(batch["loss_weights"])
    return _after(total, batch), total


def sum_loss_weights_and_tokens(
    batch: Mapping[str, jax.Array],
) -> tuple[Mapping[str, jax.Array], jax.Array, jax.Array]:
    """Returns as `sum_loss_weights`, and the number of tokens, those in documents, by the same all-reduce."""
    batch, (total, num_tokens) = sum_counts(
        batch, [batch["loss_weights"], (batch["segment_ids"] > 0).astype(jnp.float32)]
    )
    return batch, total, num_tokens


def sum_counts(
    batch: Mapping[str, jax.Array], counted: Sequence[jax.Array]
) -> tuple[Mapping[str, jax.Array], tuple[jax.Array, ...]]:
    """Returns the batch, as `sum_loss_weights`, and the sum of each of some arrays [B, T], by the same all-reduce."""
    first, *others = jnp.sum(jnp.stack(counted), axis=(1, 2))
    return _after(first, batch), (first, *others)


def _after(total: jax.Array, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    return {**batch, "tokens": jnp.where(total >= 0, batch["tokens"], 0)} if platform() == "cpu" else batch
