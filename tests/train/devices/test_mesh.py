"""Every mesh is the same model (C6): eight virtual devices against one."""

import dataclasses
import functools
import re
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.kernels
from data.errors import InputError
from model.parameters import parameter_table
from model.trees import flattened, nested
from tests.benchmarks.meshes import BOUNDS, FAMILIES, MIXED, Steps, config_for, differences, three_steps
from tests.small import RECORDS, mesh_of, small_batch, small_weights
from train.config.reading import make_config
from train.config.run_config import MeshConfig
from train.devices.mesh import batch_sharding, count_slices, make_mesh, mesh_shape
from train.devices.mesh_checks import matmul_problems, mesh_problems, rule_problems
from train.devices.rules import TRAINING
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state, make_state
from train.step.step import make_train_step, summed_loss

ROOT = Path(__file__).resolve().parents[3]
SHARED = MIXED[0]


@functools.cache
def one_device() -> Steps:
    return three_steps(config_for(), {})


def assert_within(kind: str, actual: Steps, expected: Steps) -> None:
    worst = differences(actual, expected)
    for name, bound in BOUNDS[kind].items():
        assert worst[name] <= bound, name


# Slices, data and context alone are in `tests.benchmarks.meshes`; here they are among the pairs.
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"tensor": 4}, *MIXED], ids=str)
def test_a_mesh_begins_with_the_same_bits_and_trains_the_same(shape):
    assert_within("float32", three_steps(config_for(), shape), one_device())


@pytest.mark.parametrize(
    ("shape", "policy"), [({"context": 8}, "none"), ({"fsdp": 2, "context": 2, "tensor": 2}, "attention")], ids=str
)
def test_a_ring_of_keys_trains_the_same(shape, policy: str):
    config = config_for(context_attention="ring", remat_policy=policy)
    assert_within("float32", three_steps(config, shape, from_one_device=True), one_device())


def test_in_bfloat16_a_mesh_agrees_to_its_precision():
    config = config_for(compute_dtype="bfloat16", num_layers=1)
    assert_within("bfloat16", three_steps(config, MIXED[1], from_one_device=True), three_steps(config, {}))


@pytest.mark.parametrize("matmul_dtype", ["float8", "int8"])
def test_with_products_of_8_bits_meshes_agree_to_their_precision(matmul_dtype: str):
    config = config_for(matmul_dtype=matmul_dtype, num_layers=1)
    assert_within("8 bits", three_steps(config, MIXED[1], from_one_device=True), three_steps(config, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_floor_is_the_same_on_a_mesh_dropout_and_accumulation_included(family: str):
    # The stack of layers is that of the tests above, but for a pattern.
    fields = {"num_layers": 1} | FAMILIES[family]
    assert_within("every floor", three_steps(config_for(2, **fields), SHARED), three_steps(config_for(**fields), {}))


@functools.cache
def gradients_of_records(**shape: int) -> dict[str, np.ndarray]:
    """The loss and its gradients for weights of which no gate and no scalar is where it starts."""
    config = config_for(num_layers=3, **RECORDS)
    table, weights = parameter_table(config.model), flattened(jax.device_get(small_weights(config.model)))
    with jax.set_mesh(mesh_of(**shape)):
        weights = nested({name: jax.device_put(x, TRAINING.spec(*table[name].axes)) for name, x in weights.items()})
        batch = jax.device_put(small_batch(), batch_sharding(jax.sharding.get_mesh()))
        loss = lambda weights: summed_loss(config, weights, batch)[0]
        loss, gradients = jax.device_get(jax.jit(jax.value_and_grad(loss))(weights))
    return flattened(gradients) | {"loss": loss}


# Positions before are on other devices; tables, gates and heads are shared; and more devices than heads share rows.
@pytest.mark.parametrize("shape", [MIXED[1], {"slices": 2, "fsdp": 2, "context": 2}], ids=str)
def test_smear_gates_scalars_and_value_embeddings_are_the_same_on_a_mesh(shape):
    found, expected = gradients_of_records(**shape), gradients_of_records()
    for name, x in expected.items():
        assert np.abs(x).max() > 1e-3, name
        np.testing.assert_allclose(found[name], x, atol=BOUNDS["float32"]["gradients"] * np.abs(x).max(), err_msg=name)


def test_one_key_head_of_all_queries_trains_the_same_on_a_mesh_and_without_a_cpus_forms(monkeypatch):
    config = config_for(num_layers=1, num_kv_heads=1)
    expected = three_steps(config, {})
    assert_within("float32", three_steps(config, {"fsdp": 2}, from_one_device=True), expected)
    monkeypatch.setattr(model.kernels, "on_one_cpu", lambda: False)
    assert_within("float32", three_steps(config, {}, from_one_device=True), expected)


def test_programs_optimized_in_full_begin_with_the_same_bits_too():
    jax.config.update("jax_disable_most_optimizations", False)
    config = config_for()
    weights = []
    for shape in ({}, {"fsdp": 2, "context": 2, "tensor": 2}):
        with jax.set_mesh(mesh_of(**shape)):
            weights.append(jax.device_get(make_state(config, make_optimizer(config))["weights"]))
    jax.config.update("jax_disable_most_optimizations", True)
    for one, other in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_documented_tolerances_are_those_of_the_tests():
    rows = (ROOT / "docs" / "tolerances.md").read_text()
    for kind, bounds in BOUNDS.items():
        for name, bound in bounds.items():
            assert re.search(rf"^\| {kind} \| {name} \|.*\| {bound:.0e} \|$", rows, re.M), (kind, name)


def test_weights_moments_and_gradients_are_stored_in_shards():
    config = config_for()
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        state = make_state(config, make_optimizer(config))
        table = state["weights"]["embedding"]["table"]
        assert table.sharding.shard_shape(table.shape) == (384 // 2, 32 // 4)
        shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state["weights"]) if x.ndim > 2}
        assert all(np.prod(shape) * 8 in {2 * 32 * 32, 2 * 32 * 64} for shape in shapes)
        for moment in ("mu", "nu"):
            moments = getattr(state["optimizer"]["adam"], moment)
            for one, other in zip(jax.tree.leaves(moments), jax.tree.leaves(state["weights"]), strict=True):
                assert one.sharding == other.sharding
        for one, other in zip(jax.tree.leaves(state["average"]), jax.tree.leaves(state["weights"]), strict=True):
            assert one.sharding == other.sharding
            assert one.dtype == jnp.float32
        abstract = abstract_state(config, make_optimizer(config))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), abstract
        )


def test_the_compiled_step_reuses_the_memory_of_its_state():
    config = config_for()
    mesh = mesh_of(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in small_batch().items()}
        memory = make_train_step(config, optimizer).lower(state, batch).compile().memory_analysis()
    size = sum(x.size // 8 * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.95 * size


def test_slices_are_counted_on_tpus_and_hosts_of_gpus_are_none():
    for platform, expected in (("tpu", 3), ("gpu", 1), ("cpu", 1)):
        devices = [SimpleNamespace(platform=platform, slice_index=i // 2) for i in range(6)]
        assert count_slices(devices) == expected


def test_minus_one_takes_all_other_devices():
    assert mesh_shape(MeshConfig(), 8) == (1, 1, 8, 1, 1, 1)
    assert mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8) == (1, 2, 2, 1, 1, 2)
    assert mesh_shape(MeshConfig(data=-1, fsdp=2), 8) == (1, 4, 2, 1, 1, 1)
    assert mesh_shape(MeshConfig(fsdp=2, context=-1), 8) == (1, 1, 2, 1, 4, 1)
    assert mesh_shape(MeshConfig(slices=2), 8) == (2, 1, 4, 1, 1, 1)
    assert mesh_shape(MeshConfig(tensor=2), 16, num_slices=2) == (2, 1, 4, 1, 1, 2)
    assert mesh_shape(MeshConfig(slices=4), 16, num_slices=2) == (4, 1, 4, 1, 1, 1)
    for wrong in (MeshConfig(data=3), MeshConfig(data=2, fsdp=2, tensor=1)):
        with pytest.raises(InputError, match="does not fit 8 devices"):
            mesh_shape(wrong, 8)
    with pytest.raises(InputError, match="does not fit 4 devices a slice"):
        mesh_shape(MeshConfig(fsdp=8), 8, num_slices=2)
    for slices in (3, 1):
        with pytest.raises(InputError, match="mesh.slices"):
            mesh_shape(MeshConfig(slices=slices), 8, num_slices=2)


def test_a_size_that_cannot_be_sharded_is_named_with_the_axis_and_a_size_that_works():
    config = make_config(
        {
            "model": {"num_heads": 6, "num_kv_heads": 3, "model_dim": 36, "feedforward_dim": 50, "vocab_size": 300},
            "data": {"segment_length": 6, "num_streams": 2},
            "train": {"batch_size": 6},
        }
    ).resolved()
    problems = "\n".join(mesh_problems(config, (1, 1, 4, 1, 1, 4)))
    for words in (
        "train.batch_size / train.accumulation_steps = 6 cannot be shared by mesh.fsdp = 4",
        "data.num_streams = 2",
        "data.segment_length = 6 cannot be shared by mesh.tensor = 4; nearest size that works: 3",
        "model.num_heads = 6",
        "model.num_kv_heads = 3",
        "model.feedforward_dim = 50",
    ):
        assert words in problems
    assert "model.model_dim" not in problems
    assert mesh_problems(
        make_config({"model": {"model_dim": 100, "head_dim": 16}}).resolved(512), (1, 1, 1, 1, 1, 8)
    ) == [
        "model.num_heads = 4 cannot be shared by mesh.tensor = 8; nearest size that works: 4",
        "model.num_kv_heads = 4 cannot be shared by mesh.tensor = 8; nearest size that works: 4",
    ]
    assert mesh_problems(make_config({}).resolved(4096), (1, 1, 4, 1, 1, 2)) == []
    # A billion devices are no reason to count to a billion.
    begun = time.monotonic()
    assert "nearest size that works: 16" in mesh_problems(make_config({}).resolved(4096), (1, 1, 10**9, 1, 1, 1))[0]
    assert time.monotonic() - begun < 1
    values = {"model_dim": 64, "head_dim": 12, "num_kv_heads": 1, "value_embedding_every": 2}
    assert mesh_problems(make_config({"model": values}).resolved(4096), (1, 1, 8, 1, 1, 1)) == [
        "model.num_kv_heads × model.head_dim = 12 cannot be shared by mesh.fsdp = 8; nearest size that works: 6"
    ]
    ramp = make_config({"train": {"batch_ramp_start": 4, "batch_ramp_steps": 10}}).resolved(4096)
    assert mesh_problems(ramp, (1, 2, 4, 1, 1, 1)) == [
        "train.batch_ramp_start = 4 cannot be shared by mesh.data × mesh.fsdp = 8; nearest size that works: 4",
        "data.num_streams = 4 cannot be shared by mesh.data × mesh.fsdp = 8; nearest size that works: 4",
    ]
    long = make_config({"data": {"segment_length": 40}}).resolved(4096)
    assert mesh_problems(long, (1, 1, 1, 1, 8, 1)) == [
        "data.segment_length = 40 cannot be shared by mesh.context = 8 in 2 pieces each; nearest size that works: 5"
    ]
    with pytest.raises(InputError, match="mesh.fsdp"):
        make_mesh(make_config({"train": {"batch_size": 3}}).resolved(4096))
    for kernel, words in (
        ("splash", "positions a device are not a multiple of 128"),
        ("cudnn", "there is none for cpu"),
    ):
        model = {"attention_kernel": kernel, "compute_dtype": "float32"}
        with pytest.raises(InputError, match=words):
            make_mesh(make_config({"model": model, "data": {"segment_length": 40}}).resolved(4096))


@pytest.mark.parametrize(
    ("dtype", "kind", "words"),
    [
        ("float8", "TPU v5 lite", "TPU v5 lite does not multiply it faster than bfloat16; give int8, or leave it"),
        ("float8", "NVIDIA A100-SXM4-80GB", "give int8, or leave it at none"),
        ("int8", "TPU v4", "model.matmul_dtype = int8: TPU v4 does not multiply it faster than bfloat16; leave it"),
    ],
)
def test_a_matmul_dtype_that_a_chip_does_not_have_is_named(dtype: str, kind: str, words: str):
    config = make_config({"model": {"matmul_dtype": dtype}}).resolved(4096)
    with pytest.raises(InputError, match=re.escape(words)):
        make_mesh(config, [SimpleNamespace(platform="gpu", device_kind=kind)])
    for good in ("NVIDIA H100 80GB HBM3", "cpu", "a chip without figures"):
        assert matmul_problems(config.model, good) == []


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"heds": ["tensor"]}, "there is no logical axis 'heds'"),
        ({"heads": ["tensr"]}, "mesh.rules.heads: there is no mesh axis 'tensr'"),
        ({"heads": "tensor"}, "it must be a list of mesh axes"),
        ({"vocabulary": ["tensor", "context"]}, "'time' and 'vocabulary' of one array are both shared by 'context'"),
        ({"feedforward": ["tensor", "tensor"]}, "'tensor' is listed twice"),
        ({"feedforward": ["fsdp"], "batch": ["data"]}, "'feedforward' and 'model' of one weight are both shared by"),
        ({"heads": []}, "'heads' and 'kv_heads' must be shared by the same mesh axes"),
        ({"sequence": ["tensor", "context"]}, "'sequence' must begin with the mesh axes of 'time'"),
    ],
    ids=str,
)
def test_an_invalid_rule_is_named(rules: dict, words: str):
    assert words in "\n".join(rule_problems(MeshConfig(rules=rules)))
    with pytest.raises(InputError, match="mesh.rules"):
        make_mesh(make_config({"mesh": {"rules": rules}}).resolved(4096))


@pytest.mark.parametrize(
    ("rules", "parts", "policy"),
    [
        ({"model": ["fsdp", "context", "data"], "vocabulary": [], "sequence": ["context"]}, 1, "none"),
        ({"model": [], "feedforward": []}, 2, "products"),
        ({"heads": [], "kv_heads": []}, 2, "full"),
        (
            {
                "batch": ["slice", "data"],
                "model": ["fsdp"],
                "time": ["fsdp", "context"],
                "sequence": ["fsdp", "context"],
            },
            1,
            "none",
        ),
    ],
    ids=str,
)
def test_other_rules_remat_and_accumulation_are_the_same_model(rules: dict, parts: int, policy: str):
    config = dataclasses.replace(config_for(parts, remat_policy=policy), mesh=MeshConfig(rules=rules))
    assert rule_problems(config.mesh) == []
    shape = {"data": 2, "context": 2, "tensor": 2}
    assert_within("float32", three_steps(config, shape, from_one_device=True), one_device())
