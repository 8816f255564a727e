"""The estimates that a search begins with: of what, in which order, and beside what is known exactly."""

import math
from dataclasses import replace

import pytest

from data.errors import InputError
from launch.presets import load_config
from model.kernels import KernelChoice
from model.parameters import parameter_table
from tests.peers import require
from train.config.config import Config
from train.devices.hardware import CHIPS, with_usable_memory
from train.devices.mesh import make_mesh
from train.devices.mesh_checks import mesh_problems
from train.devices.rules import AXES
from train.planning.estimate import Machine, estimate
from train.planning.plan import argument_bytes
from train.planning.search import (
    PARTS,
    REMAT,
    SEARCHED,
    SECONDS_ERROR,
    Candidate,
    candidates,
    interleaved,
    worth_compiling,
)
from train.planning.speed import reached
from train.planning.topology import topology_devices

CHIP = CHIPS["v5e"]
ROOMY = replace(CHIP, memory_bytes=2**50)


def config_of(**overrides: object) -> Config:
    """Llama 2 7B, 64 rows."""
    texts = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    config = load_config("llama2_7b", {"train.batch_size": "64"} | texts)
    return config.resolved(config.tokenizer.vocab_size)


def with_changes(config: Config, candidate: Candidate) -> Config:
    """The config that the candidate's flags come to."""
    model = replace(config.model, remat_policy=candidate.changes["model.remat_policy"])
    train = replace(config.train, accumulation_steps=int(candidate.changes["train.accumulation_steps"]))
    sizes = {axis: int(candidate.changes[f"mesh.{axis}"]) for axis in AXES[1:]}
    return replace(config, model=model, train=train, mesh=replace(config.mesh, **sizes))


def test_the_first_programs_of_a_search_are_those_that_compiled_fastest():
    """Of those for 1,024 rows that were compiled (docs/scaling.md), this took least: 62.3 s."""
    require("libtpu")
    config = load_config("llama3_8b", {})
    chip = with_usable_memory(CHIPS["v6e"])
    found = candidates(config.resolved(config.tokenizer.vocab_size), topology_devices("v6e:4x4"), chip, [])
    fastest = {"mesh.fsdp": "16", PARTS: "32", REMAT: "attention"}
    assert any(fastest.items() <= candidate.changes.items() for candidate in found[:2])


def test_products_of_8_bits_are_estimated_at_their_rate():
    chip = CHIPS["h100"]
    machine = Machine(dict.fromkeys(AXES, 1), chip, lambda axes: 1e9, KernelChoice("cudnn", ""), 3.0)
    none, float8 = (config_of(model__remat_policy="none", model__matmul_dtype=dtype) for dtype in ("none", "float8"))
    matrices = sum(math.prod(p.shape) for p in parameter_table(none.model).values() if p.role == "matrix")
    # Forward, and the gradients of activations.
    flops = 2 * 2 * matrices * none.train.batch_size * none.data.segment_length
    saved = estimate(none, machine).compute_seconds - estimate(float8, machine).compute_seconds
    assert saved == pytest.approx((flops / chip.peak_flops - flops / chip.eight_bit_flops) / reached(chip).products)


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    """All candidates on 32 chips."""
    require("libtpu")
    return candidates(config_of(), topology_devices("v5e:4x8"), CHIP, ())


def test_sparse_cores_send_during_the_products_but_sums_of_parts_over_copies_are_last():
    def sent(chip: str, parts: int) -> float:
        machine = Machine(dict.fromkeys(AXES, 1) | {"data": 4, "fsdp": 4}, CHIPS[chip], lambda axes: 1e11,
                          KernelChoice("splash", ""), 3.0)  # fmt: skip
        return estimate(config_of(train__accumulation_steps=parts), machine).communication_seconds

    last = config_of()
    table = parameter_table(last.model).values()
    shards = sum(math.prod(p.shape) for p in table if p.role in ("matrix", "unembedding")) * 2 / 4
    copies = shards * 3 / 4 * 2 / 1e11
    assert sent("v5e", 4) - copies == pytest.approx(4 * (sent("v5e", 1) - copies), rel=1e-3)
    assert sent("v5p", 1) == pytest.approx(0.1 * sent("v5e", 1), rel=1e-3)
    assert sent("v5p", 4) - copies == pytest.approx(0.1 * (sent("v5e", 4) - copies), rel=1e-3)


def test_candidates_are_legal_different_and_the_fastest_come_first(found: list[Candidate]):
    assert len({tuple(c.changes.items()) for c in found}) == len(found) > 100
    assert all(set(c.changes) == set(SEARCHED) for c in found)
    for candidate in found[:: len(found) // 50]:
        config = with_changes(config_of(), candidate)
        assert math.prod(candidate.mesh.values()) == 32
        assert mesh_problems(config, tuple(candidate.mesh.values())) == []
        parts, copies = config.train.accumulation_steps, math.prod(candidate.mesh[a] for a in ("slice", "data", "fsdp"))
        assert candidate.rows * parts * copies == config.train.batch_size == candidate.batch_size
        assert candidate.changes["train.batch_size"] == str(candidate.batch_size)
    order = [(c.estimate.peak_bytes > CHIP.memory_bytes, c.estimate.step_seconds) for c in found]
    assert order == sorted(order)
    for axis in ("data", "fsdp", "context", "tensor"):
        assert {c.mesh[axis] for c in found} >= {1, 2, 4}


def test_fields_that_are_given_stay():
    require("libtpu")
    config = config_of(mesh__tensor=2, mesh__fsdp=1, mesh__data=-1, model__remat_policy="full")
    given = {"mesh.tensor", "mesh.data", "model.remat_policy"}
    found = candidates(config, topology_devices("v5e:2x4"), ROOMY, given)
    assert {c.mesh["tensor"] for c in found} == {2}
    assert {c.mesh["data"] for c in found} > {1}
    assert {c.changes["model.remat_policy"] for c in found} == {"full"}


def test_meshes_on_which_a_kernel_that_is_asked_for_cannot_be_are_left_out():
    require("libtpu")
    config = config_of(model__attention_kernel="splash", data__segment_length=256)
    found = candidates(config, topology_devices("v5e:2x4"), ROOMY, ())
    assert {c.mesh["context"] for c in found} == {1, 2}


def test_slices_stay_apart():
    require("libtpu")
    found = candidates(config_of(), topology_devices("v5e:2x2", slices=2), ROOMY, ())
    assert {c.mesh["slice"] for c in found} == {2}


def test_the_estimated_state_is_what_the_devices_are_given(found: list[Candidate]):
    devices = topology_devices("v5e:4x8")
    for candidate in found[:: len(found) // 10]:
        config = with_changes(config_of(), candidate)
        given = argument_bytes(config, make_mesh(config, devices))
        assert candidate.estimate.state_bytes == pytest.approx(sum(given.values()) - given["batch"], rel=1e-3)


def test_the_estimated_state_of_soap_is_so_too_though_not_shared_as_the_weights_are():
    require("libtpu")
    config, devices = config_of(optimizer__name="soap", model__num_layers=6), topology_devices("v5e:2x4")
    found = candidates(config, devices, ROOMY, {PARTS, REMAT})
    shares = set()
    for candidate in found:
        given = argument_bytes(with_changes(config, candidate), make_mesh(with_changes(config, candidate), devices))
        assert candidate.estimate.state_bytes == pytest.approx(sum(given.values()) - given["batch"], rel=1e-3)
        shares.add(round(given["optimizer"] / given["weights"], 3))
    assert len(shares) > 1


def test_more_is_held_and_less_is_done_where_less_is_made_again():
    require("libtpu")
    everything = candidates(config_of(), topology_devices("v5e:4x4"), ROOMY, ())
    by = {(tuple(c.mesh.values()), c.changes[PARTS], c.changes[REMAT]): c.estimate for c in everything}
    meshes = {key[:2] for key in by}
    assert len(meshes) > 50
    for key in meshes:
        full, attention, products, none = (by[*key, name] for name in ("full", "attention", "products", "none"))
        assert full.peak_bytes < attention.peak_bytes < products.peak_bytes < none.peak_bytes
        assert full.step_seconds > attention.step_seconds > products.step_seconds >= none.step_seconds


def test_what_cannot_be_is_said_with_what_to_do():
    require("libtpu")
    devices = topology_devices("v5e:2x2")
    with pytest.raises(InputError, match=r"none of \d+ legal steps of 64 rows may fit: the smallest is estimated at"):
        candidates(config_of(), devices, CHIP, {PARTS, REMAT})
    with pytest.raises(InputError, match="nearest size that works"):
        candidates(config_of(train__batch_size=3, mesh__fsdp=4), devices, CHIP, ("mesh.fsdp",))


def test_nothing_is_compiled_that_cannot_be_faster(found: list[Candidate]):
    first, last = found[0], found[-1]
    seconds = first.estimate.step_seconds
    assert worth_compiling(last, [])
    # All estimates are half of what they should be.
    assert worth_compiling(first, [(first, 2 * seconds)])
    slower = last.estimate.step_seconds * (1 - SECONDS_ERROR) / seconds
    assert slower > 1
    assert not worth_compiling(last, [(first, 2 * seconds)])
    # One step out of three is off otherwise than the others.
    assert not worth_compiling(last, [(first, 2 * seconds), (first, seconds), (first, 2.1 * seconds)])


def test_a_batch_size_is_compiled_until_none_of_its_own_can_be_faster(found: list[Candidate]):
    first, last = found[0], found[-1]
    other = last._replace(batch_size=2 * last.batch_size)
    tried = [(first, first.estimate.step_seconds)]
    assert not worth_compiling(last, tried)
    assert worth_compiling(other, tried)
    assert not worth_compiling(other, [*tried, (first._replace(batch_size=other.batch_size), 1e-9)])


def test_batch_sizes_take_turns(found: list[Candidate]):
    a, b = found[:3], [c._replace(batch_size=8) for c in found[:2]]
    assert interleaved([a, b]) == [a[0], b[0], a[1], b[1], a[2]]
    assert interleaved([a]) == a
