"""Faults of JAX and XLA that the model works around. A test that passes here means that its workaround can go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.model.test_kernels import config_for, inputs, result_and_gradients
from tests.small import mesh_of
from train.devices.rules import TRAINING


@pytest.mark.xfail(
    jax.__version_info__ < (0, 12),
    strict=True,
    reason="XLA drops a reduction: see https://github.com/openxla/xla/issues/40034; JAX 0.12.0.1 does not",
)
def test_unreduced_arrays_may_move_between_shards_before_they_are_summed():
    """Once JAX 0.10 is no longer supported, `model.embedding.embedding_lookup` needs one reshard."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(8, 6)).astype(np.float32), random.normal(size=(8, 16)).astype(np.float32)

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        split = PartitionSpec(None, ("tensor", "context"), unreduced={"data"})
        sums = jnp.einsum("bi,bd->id", a, b, out_sharding=split)
        moved = jax.reshard(sums, PartitionSpec(None, "context", unreduced={"data"}))
        return jax.reshard(moved, PartitionSpec(None, "context"))

    with jax.set_mesh(mesh_of(data=2, context=2, tensor=2)):
        a_sharded = jax.device_put(a, PartitionSpec("data", None))
        b_sharded = jax.device_put(b, PartitionSpec("data", ("tensor", "context")))
        np.testing.assert_allclose(product(a_sharded, b_sharded), a.T @ b, atol=1e-5)


@pytest.mark.xfail(strict=True, reason="seen in JAX 0.10.2; 0.11 had https://github.com/jax-ml/jax/issues/39309")
def test_a_reshape_keeps_the_sharding_of_an_axis_of_size_1():
    """If this passes: `model.sharding.split_axis` and `join_axis` can leave the sharding to JAX."""
    with jax.set_mesh(mesh_of()):
        x = jax.device_put(np.zeros((2, 4, 3)), PartitionSpec("data", "tensor", None))
        split = jnp.reshape(x, (2, 1, 4, 3))
        assert jax.typeof(split).sharding.spec == PartitionSpec("data", "tensor", None, None)


@pytest.mark.xfail(strict=True, raises=ValueError, reason="Pallas calls of splash attention state no vma, JAX 0.10.2")
def test_splash_attention_states_over_which_mesh_axes_its_result_varies(monkeypatch: pytest.MonkeyPatch):
    """If this passes: `model.kernels` can leave `check_vma` on, at least for splash attention."""
    shard_map = jax.shard_map
    monkeypatch.setattr(jax, "shard_map", lambda function, *, check_vma, **specs: shard_map(function, **specs))
    config = config_for("splash")
    result_and_gradients(config, mesh_of(fsdp=2), TRAINING, inputs(config))
