"""Devices that are not here: what there is of them, what a user gets wrong, and what their links carry."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.errors import InputError
from tests.peers import require
from tests.small import mesh_of
from train.devices.hardware import CHIPS, chip_of
from train.devices.mesh import explicit_mesh
from train.devices.xla import compiler_options
from train.planning.reader import read_program
from train.planning.topology import bandwidth_over, topology_devices, without_jax_cache

ROOT = Path(__file__).resolve().parents[3]
WRONG = [
    ("v5x:2x2", 1, "unknown chip 'v5x'; known are v4, v5e.*; did you mean v5"),
    ("v5e", 1, "'' is not a shape; give one as in v5e:2x2 or v5e:16x16"),
    ("v5e:2x", 1, "'2x' is not a shape"),
    ("v5e:0x2", 1, "'0x2' is not a shape"),
    ("v5e:4x4x4", 1, "the shape of v5e has 2 dimensions"),
    ("v5p:4x4", 1, "the shape of v5p has 3 dimensions, as in v5p:2x2x1"),
    ("v6e:3x4", 1, "the first two sizes are even, as in v6e:2x2"),
    ("v5e:32x32", 1, "at most 256 chips; give several, as in --topology=v5e:16x16 --slices=4"),
    ("tpu7x:2x2", 1, "the shape of tpu7x has 3 dimensions, as in tpu7x:2x2x1"),
    ("tpu7x:16x32x32", 1, "at most 9216 chips"),
    ("v5e:2x2", 0, "--slices=0: give at least 1"),
    ("h100:8", 1, "hosts × GPUs of each, as in h100:1x8 or h100:16x8"),
    ("h100:1x16", 1, "a host has at most 8 GPUs"),
    ("h100:4x8", 2, "--slices=2: .* give more hosts, as in --topology=h100:8x8"),
]


def tpus(text: str, slices: int = 1) -> list:
    """Of a topology; the test is skipped where the TPU compiler is missing."""
    require("libtpu")
    return topology_devices(text, slices)


def gpus(text: str) -> list:
    """Of a topology; the test is skipped where the CUDA plugin is missing."""
    require("jax_cuda13_plugin")
    return topology_devices(text)


@pytest.mark.parametrize(("text", "slices", "words"), WRONG, ids=[f"{text}, {slices}" for text, slices, _ in WRONG])
def test_a_wrong_topology_is_refused_with_what_would_be_right(text: str, slices: int, words: str):
    with pytest.raises(InputError, match=words):
        topology_devices(text, slices)


SIZES = [("v4:2x2x1", 4), ("v5e:16x16", 256), ("v5e:1x1", 1), ("v5p:4x4x8", 128), ("tpu7x:2x2x1", 8)]


@pytest.mark.parametrize(("text", "devices"), SIZES)
def test_a_slice_has_the_devices_of_each_chip_of_the_kind_in_the_table(text: str, devices: int):
    found = tpus(text)
    assert len(found) == devices
    assert {chip_of(device.device_kind) for device in found} == {CHIPS[text.split(":")[0]]}
    assert {device.platform for device in found} == {"tpu"}


def test_slices_are_told_apart_and_gpus_are_of_their_hosts():
    assert sorted({device.slice_index for device in tpus("v6e:2x2", slices=3)}) == [0, 1, 2]
    found = gpus("h100:2x4")
    assert [device.process_index for device in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {chip_of(device.device_kind) for device in found} == {CHIPS["h100"]}


def test_cpu_devices_stay_what_they_were():
    before = jax.devices()
    tpus("v5e:2x2")
    assert jax.devices() == before
    assert jax.jit(lambda x: x + 1)(1) == 2


def test_a_missing_compiler_is_named_with_its_install_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "libtpu" else real(name))
    with pytest.raises(InputError, match=r"the TPU compiler is not installed; .* pip install -e '.\[plan\]'"):
        topology_devices("v5e:2x2")

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"JAX's CUDA plugin is not installed.* pip install -e '.\[plan-cuda\]'"):
        topology_devices("h100:1x8")


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("Couldn't find a suitable version of ptxas", "ptxas"),
        ("libdevice not found", "libdevice"),
        ("cuDNN not found.", "cuDNN"),
    ],
)
def test_a_gpu_compiler_that_lacks_a_part_says_so_at_once(said: str, part: str, monkeypatch):
    require("jax_cuda13_plugin")

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fails)
    with pytest.raises(InputError, match=rf"{part} is not installed.* pip install -e '.\[plan-cuda\]'"):
        topology_devices("h100:1x8")


def test_importing_the_module_and_reading_a_topology_change_nothing():
    code = """
import os, jax
before = dict(os.environ)
from train.planning.topology import parse_topology
assert parse_topology("v5p:8x8x8")[1] == (8, 8, 8)
assert dict(os.environ) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_whole_torus_is_gathered_over_its_rings(slices: int):
    """A compiler that does not know of them, or that sees a torus in each slice, sums zeros, of twice the bytes."""
    devices = tpus("v5p:4x4x4", slices)
    tori = [[device for device in devices if getattr(device, "slice_index", 0) == at] for at in range(slices)]
    placed = [mesh_utils.create_device_mesh((64,), torus, allow_split_physical_axes=True) for torus in tori]
    fsdp = mesh(placed, slice=slices, fsdp=64)
    array = jax.ShapeDtypeStruct((8192, 128), jnp.bfloat16, sharding=NamedSharding(fsdp, PartitionSpec("fsdp")))
    with jax.set_mesh(fsdp), without_jax_cache():
        gather = jax.jit(lambda x: jax.reshard(x, PartitionSpec()), compiler_options=compiler_options())
        program = gather.lower(array).compile().as_text()
    collectives = read_program(program, dict(fsdp.shape)).collectives
    assert [(c.kind, c.axes) for c in collectives] == [("all-gather", ("fsdp",))]
    # It runs while the TensorCores compute.
    assert 'async_execution_thread="sparsecore"' in program


def mesh(devices: list, **axes: int) -> Mesh:
    shape = tuple(axes.get(name, 1) for name in ("slice", "data", "fsdp", "expert", "context", "tensor"))
    return explicit_mesh(np.array(devices).reshape(shape))


def test_links_are_counted_by_the_rings_and_lines_that_an_axis_spans():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    by_place = sorted(tpus("v5e:16x16"), key=lambda device: device.coords)
    # Two rings of 16, one of them, a line of 4 in one direction, and 4 that leave gaps of 4 to three other groups.
    assert bandwidth_over(mesh(by_place, fsdp=256), ["fsdp"], v5e) == 2 * v5e.link_bandwidth
    assert bandwidth_over(mesh(by_place, fsdp=16, tensor=16), ["tensor"], v5e) == v5e.link_bandwidth
    lines = mesh(by_place, data=16, fsdp=4, tensor=4)
    assert bandwidth_over(lines, ["tensor"], v5e) == v5e.link_bandwidth / 2
    assert bandwidth_over(lines, ["fsdp"], v5e) == v5e.link_bandwidth / 4
    assert bandwidth_over(lines, ["fsdp", "tensor"], v5e) == v5e.link_bandwidth
    # An edge of 4 closes to a ring on v5p, not on v5e.
    cube = sorted(tpus("v5p:4x4x4"), key=lambda device: device.coords)
    assert bandwidth_over(mesh(cube, fsdp=16, tensor=4), ["tensor"], v5p) == v5p.link_bandwidth
    # Half a cube is linked nowhere, and of a v5e's 8 × 16 the longer dimension.
    half = sorted(tpus("v5p:2x4x4"), key=lambda device: device.coords)
    assert bandwidth_over(mesh(half, fsdp=8, tensor=4), ["tensor"], v5p) == v5p.link_bandwidth / 2
    long = sorted(tpus("v5e:8x16"), key=lambda device: device.coords)
    assert bandwidth_over(mesh(long, fsdp=8, tensor=16), ["tensor"], v5e) == v5e.link_bandwidth
    assert bandwidth_over(mesh(long, fsdp=8, tensor=16), ["fsdp"], v5e) == v5e.link_bandwidth / 2
    square = sorted(tpus("v5e:4x4"), key=lambda device: device.coords)
    assert bandwidth_over(mesh(square, fsdp=4, tensor=4), ["tensor"], v5e) == v5e.link_bandwidth / 2


def test_two_devices_of_a_chip_share_its_links_and_have_one_between_them():
    chip = CHIPS["tpu7x"]
    link, die = chip.link_bandwidth, chip.die_bandwidth
    by_place = sorted(tpus("tpu7x:4x4x4"), key=lambda device: (device.coords, device.core_on_chip))
    dies = mesh(by_place, data=16, fsdp=4, tensor=2)
    assert bandwidth_over(dies, ["tensor"], chip) == die
    # Rings of one die of each chip share links with those of the others; a ring of both leaves a chip once.
    assert bandwidth_over(dies, ["fsdp"], chip) == link / 2
    assert bandwidth_over(dies, ["fsdp", "tensor"], chip) == link
    assert bandwidth_over(dies, ["data", "fsdp"], chip) == 3 * link / 2
    assert bandwidth_over(mesh(by_place, fsdp=128), ["fsdp"], chip) == 3 * link


def test_slices_and_hosts_are_linked_by_their_network_cards():
    v5e, h100 = CHIPS["v5e"], CHIPS["h100"]
    two = sorted(tpus("v5e:4x4", slices=2), key=lambda device: device.slice_index)
    assert bandwidth_over(mesh(two, slice=2, fsdp=16), ["slice"], v5e) == v5e.network_bandwidth
    assert bandwidth_over(mesh(two, slice=2, fsdp=16), ["slice", "fsdp"], v5e) == 16 * v5e.network_bandwidth

    hosts = gpus("h100:4x8")
    assert bandwidth_over(mesh(hosts, fsdp=4, tensor=8), ["tensor"], h100) == h100.link_bandwidth
    assert bandwidth_over(mesh(hosts, fsdp=4, tensor=8), ["fsdp"], h100) == h100.network_bandwidth
    assert bandwidth_over(mesh(hosts, fsdp=32), ["fsdp"], h100) == 8 * h100.network_bandwidth
    assert bandwidth_over(mesh_of(fsdp=4), ["tensor"], h100) == math.inf
