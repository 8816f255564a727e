"""Replicas: a bit that differs is reported with its device on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data.errors import Fault
from tests.small import mesh_of
from train.checkpoint.replicas import check_replicas, is_finite


def put(mesh, spec, value: np.ndarray, wrong: dict[int, np.ndarray] | None = None) -> jax.Array:
    """An array on a mesh, with different content on some devices."""
    sharding = NamedSharding(mesh, spec)
    parts = [
        jax.device_put((wrong or {}).get(device.id, value)[index], device)
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)


VALUE = np.arange(64, dtype=np.float32).reshape(8, 8)
FLIPPED = VALUE.copy()
FLIPPED.view(np.uint32)[5, 6] ^= 1
SPECS = [PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "tensor"), PartitionSpec("tensor", "fsdp")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_flipped_bit_of_one_copy_is_found_with_its_device(spec):
    mesh = mesh_of(data=4, tensor=2)
    good = {"weights": {"a": put(mesh, spec, VALUE)}, "step": put(mesh, PartitionSpec(), np.zeros((), np.int32))}
    with jax.set_mesh(mesh):
        check_replicas(good)
        # The flipped bit is in the part of only one of the two devices of this copy.
        of_copy = [mesh.devices[0, 2, 0, 0, 0, i].id for i in range(2)]
        bad = good | {"weights": {"a": put(mesh, spec, VALUE, dict.fromkeys(of_copy, FLIPPED))}}
        with pytest.raises(Fault, match="copies of weights.a differ") as caught:
            check_replicas(bad)
    holders = [i for i, index in put(mesh, spec, VALUE).sharding.devices_indices_map(VALUE.shape).items()]
    wrong = [d.id for d in holders if d.id in of_copy and (FLIPPED != VALUE)[mesh_index(mesh, spec, d)].any()]
    assert [f"device {d.id} " in str(caught.value) for d in holders] == [d.id in wrong for d in holders]


def mesh_index(mesh, spec, device):
    return NamedSharding(mesh, spec).devices_indices_map(VALUE.shape)[device]


def test_of_two_copies_that_differ_both_are_named_and_an_array_without_copies_is_ignored():
    mesh = mesh_of(data=2)
    value = np.ones(3, jnp.bfloat16)
    with jax.set_mesh(mesh):
        check_replicas({"weights": {"a": put(mesh, PartitionSpec("data"), VALUE)}})
        with pytest.raises(Fault, match="device 0 of process 0, device 1 of process 0"):
            check_replicas({"a": put(mesh, PartitionSpec(), value, {1: value + value})})


@pytest.mark.parametrize("item", ["weights", "optimizer", "average"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf], ids=str)
def test_a_single_number_that_is_not_finite_is_found_in_any_item(item: str, value: float):
    state = {name: {"a": jnp.ones((2, 3)), "count": jnp.int32(1)} for name in ("weights", "optimizer", "average")}
    assert is_finite(state)
    state[item]["a"] = state[item]["a"].at[1, 2].set(value)
    assert not is_finite(state)
