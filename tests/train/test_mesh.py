"""Every mesh is the same model (C6): eight virtual devices against one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import InputError
from model.parameters import flattened
from tests.small import mesh_of, small_batch, small_model
from train.config import Config, MeshConfig, make_config
from train.mesh import batch_sharding, make_mesh, mesh_problems, mesh_shape, rule_problems, training_layout
from train.optimizer import make_optimizer
from train.state import abstract_state, make_state
from train.step import make_train_step

MESHES = [
    {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 4}, {"tensor": 2}, {"context": 4}, {"fsdp": 2, "context": 4}, {"context": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2}, {"slices": 2, "fsdp": 4}, {"slices": 2, "data": 2, "context": 2},
    {"slices": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


def config_for(**model: object) -> Config:
    train, data = {"batch_size": 8, "num_steps": 100, "ema_decay": 0.5}, {"segment_length": 16}
    config = make_config({"train": train, "data": data, "optimizer": {"clip_norm": 0.5}})
    return dataclasses.replace(config, model=small_model(**({"num_kv_heads": 4} | model)))


def three_steps(config: Config, shape: dict[str, int]):
    """Initial weights, and of three training steps on a mesh the metrics, the weights and their average."""
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = make_state(config, optimizer)
        initial = jax.tree.map(np.asarray, state["weights"])
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step, metrics = make_train_step(config, optimizer), []
        for seed in range(3):
            batch = {
                name: jax.device_put(array, batch_sharding(mesh, training_layout(config.mesh)))
                for name, array in small_batch(seed=seed).items()
            }
            state, found = step(state, batch)
            metrics.append({name: float(value) for name, value in found.items()})
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        return initial, metrics, jax.tree.map(np.asarray, {"": state["weights"], "average": state["average"]})


@pytest.fixture(scope="module")
def one_device():
    return {dtype: three_steps(config_for(compute_dtype=dtype), {}) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_begins_with_the_same_bits_and_trains_the_same(shape, one_device):
    initial, metrics, weights = three_steps(config_for(), shape)
    expected_initial, expected_metrics, expected_weights = one_device["float32"]
    for one, other in zip(jax.tree.leaves(initial), jax.tree.leaves(expected_initial), strict=True):
        np.testing.assert_array_equal(one, other)
    for found, expected in zip(metrics, expected_metrics, strict=True):
        assert found["loss_weight"] == expected["loss_weight"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-6)
    initial = flattened(expected_initial)
    for name, expected in flattened(expected_weights).items():
        # By norms: Adam divides each gradient by its own size, so one that is mere rounding moves its weight freely.
        begin = initial[name.split(".", 1)[1]]
        error = np.linalg.norm(flattened(weights)[name] - expected) / np.linalg.norm(expected - begin)
        assert error < 5e-4, name


def test_gradients_agree_on_every_mesh():
    from train.step import summed_loss

    config = config_for()

    def gradients(shape):
        mesh = mesh_of(**shape)
        with jax.set_mesh(mesh):
            weights = make_state(config, make_optimizer(config))["weights"]
            batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in small_batch().items()}
            found = jax.jit(jax.grad(lambda weights: summed_loss(config, weights, batch)[0]))(weights)
            return flattened(jax.tree.map(np.asarray, found))

    expected = gradients({})
    for shape in MESHES:
        for name, array in gradients(shape).items():
            error = np.linalg.norm(array - expected[name]) / np.linalg.norm(expected[name])
            assert error < 5e-6, (shape, name)


@pytest.mark.parametrize("policy", ["products", "full"])
def test_remat_and_accumulation_work_on_a_mesh(policy: str, one_device):
    config = config_for(remat_policy=policy)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=2))
    _, metrics, _ = three_steps(config, MIXED)
    for found, expected in zip(metrics, one_device["float32"][1], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-6)


@pytest.mark.parametrize("shape", [MIXED, {"fsdp": 8}, {"fsdp": 2, "context": 4}], ids=str)
def test_in_bfloat16_meshes_agree_to_its_precision(shape, one_device):
    _, metrics, _ = three_steps(config_for(compute_dtype="bfloat16"), shape)
    for found, expected in zip(metrics, one_device["bfloat16"][1], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)


FAMILIES = {
    "gpt-2": {
        "position": "learned", "max_positions": 16, "activation": "gelu_tanh", "gated": False, "attention_bias": True,
        "feedforward_bias": True, "norm": "layernorm", "tie_embeddings": True, "embedding_dropout": 0.1,
        "attention_dropout": 0.1, "residual_dropout": 0.1,
    },
    "vaswani": {
        "position": "sinusoidal", "scale_embeddings": True, "tie_embeddings": True, "activation": "relu",
        "gated": False, "feedforward_bias": True, "norm": "layernorm", "norm_placement": "post",
        "residual_dropout": 0.2, "label_smoothing": 0.1,
    },
    "others": {
        "qk_norm": True, "sliding_window": 5, "attention_softcap": 5.0, "z_loss": 1e-2, "rope_scaling": "yarn",
        "rope_factor": 2.0, "rope_original_context": 8, "activation": "gelu", "head_dim": 16, "attention_bias": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_floor_is_the_same_on_a_mesh_dropout_and_accumulation_included(family: str):
    config = config_for(**FAMILIES[family])
    expected_initial, expected, _ = three_steps(config, {})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=2))
    initial, metrics, _ = three_steps(config, MIXED)
    for one, other in zip(jax.tree.leaves(initial), jax.tree.leaves(expected_initial), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(metrics, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)


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


def test_minus_one_is_what_is_left():
    assert mesh_shape(MeshConfig(), 8) == (1, 1, 8, 1, 1)
    assert mesh_shape(MeshConfig(data=2, fsdp=-1, tensor=2), 8) == (1, 2, 2, 1, 2)
    assert mesh_shape(MeshConfig(data=-1, fsdp=2), 8) == (1, 4, 2, 1, 1)
    assert mesh_shape(MeshConfig(fsdp=2, context=-1), 8) == (1, 1, 2, 4, 1)
    assert mesh_shape(MeshConfig(slices=2), 8) == (2, 1, 4, 1, 1)
    assert mesh_shape(MeshConfig(tensor=2), 16, num_slices=2) == (2, 1, 4, 1, 2)
    assert mesh_shape(MeshConfig(slices=4), 16, num_slices=2) == (4, 1, 4, 1, 1)
    for wrong in (MeshConfig(data=3), MeshConfig(data=2, fsdp=2, tensor=1)):
        with pytest.raises(InputError, match="does not fit 8 devices"):
            mesh_shape(wrong, 8)
    with pytest.raises(InputError, match="does not fit 4 devices a slice"):
        mesh_shape(MeshConfig(fsdp=8), 8, num_slices=2)
    for slices in (3, 1):
        with pytest.raises(InputError, match="mesh.slices"):
            mesh_shape(MeshConfig(slices=slices), 8, num_slices=2)


def test_what_cannot_be_shared_is_named_with_the_axis_and_a_size_that_works():
    config = make_config(
        {
            "model": {"num_heads": 6, "num_kv_heads": 3, "model_dim": 36, "feedforward_dim": 50, "vocab_size": 300},
            "data": {"segment_length": 6, "num_streams": 2},
            "train": {"batch_size": 6},
        }
    ).resolved()
    found = "\n".join(mesh_problems(config, (1, 1, 4, 1, 4)))
    for words in (
        "train.batch_size / train.accumulation_steps = 6 cannot be shared by mesh.fsdp = 4",
        "data.num_streams = 2",
        "data.segment_length = 6 cannot be shared by mesh.tensor = 4; nearest size that works: 3",
        "model.num_heads = 6",
        "model.num_kv_heads = 3",
        "model.feedforward_dim = 50",
    ):
        assert words in found
    assert "model.model_dim" not in found
    assert mesh_problems(make_config({"model": {"model_dim": 100, "head_dim": 16}}).resolved(512), (1, 1, 1, 1, 8)) == [
        "model.num_heads = 4 cannot be shared by mesh.tensor = 8; nearest size that works: 4",
        "model.num_kv_heads = 4 cannot be shared by mesh.tensor = 8; nearest size that works: 4",
    ]
    assert mesh_problems(make_config({}).resolved(4096), (1, 1, 4, 1, 2)) == []
    ramp = make_config({"train": {"batch_ramp_start": 4, "batch_ramp_steps": 10}}).resolved(4096)
    assert mesh_problems(ramp, (1, 2, 4, 1, 1)) == [
        "train.batch_ramp_start = 4 cannot be shared by mesh.data × mesh.fsdp = 8; nearest size that works: 4",
        "data.num_streams = 4 cannot be shared by mesh.data × mesh.fsdp = 8; nearest size that works: 4",
    ]
    long = make_config({"data": {"segment_length": 40}}).resolved(4096)
    assert mesh_problems(long, (1, 1, 1, 8, 1)) == [
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
    ("rules", "words"),
    [
        ({"heds": ["tensor"]}, "there is no logical axis 'heds'"),
        ({"heads": ["tensr"]}, "mesh.rules.heads: there is no mesh axis 'tensr'"),
        ({"heads": "tensor"}, "it must be a list of mesh axes"),
        ({"vocabulary": ["tensor", "context"]}, "'time' and 'vocabulary' of one array are both shared by 'context'"),
        ({"feedforward": ["tensor", "tensor"]}, "'tensor' stands there twice"),
        ({"feedforward": ["fsdp"], "batch": ["data"]}, "'feedforward' and 'model' of one weight are both shared by"),
        ({"heads": []}, "'heads' and 'kv_heads' must be shared by the same mesh axes"),
        ({"sequence": ["tensor", "context"]}, "'sequence' must begin with the mesh axes of 'time'"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_is_named(rules: dict, words: str):
    assert words in "\n".join(rule_problems(MeshConfig(rules=rules)))
    with pytest.raises(InputError, match="mesh.rules"):
        make_mesh(make_config({"mesh": {"rules": rules}}).resolved(4096))


@pytest.mark.parametrize(
    "rules",
    [
        {"model": ["fsdp", "context", "data"]},
        {"model": []},
        {"vocabulary": []},
        {"feedforward": []},
        {"heads": [], "kv_heads": []},
        {"sequence": ["context"]},
        {"batch": ["slice", "data"], "model": ["fsdp"], "time": ["fsdp", "context"], "sequence": ["fsdp", "context"]},
    ],
    ids=str,
)
def test_other_rules_are_the_same_model(rules: dict, one_device):
    config = dataclasses.replace(config_for(), mesh=MeshConfig(rules=rules))
    assert rule_problems(config.mesh) == []
    _, metrics, _ = three_steps(config, {"data": 2, "context": 2, "tensor": 2})
    for found, expected in zip(metrics, one_device["float32"][1], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-6)
