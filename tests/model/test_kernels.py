"""Every kernel gives the results of plain attention, in interpreter mode, on one device and on meshes."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask
from jax.sharding import AxisType

import model.cpu_attention
import model.kernels
from model.attention import attend, causal_mask
from model.config import ModelConfig
from model.context_parallel import zigzag_order
from model.kernels import (
    KernelChoice,
    attention_over,
    choose_kernel,
    has_one_backward_kernel,
    visited_pairs,
)
from model.sharding import UNSHARDED
from tests.small import mesh_of, small_model
from train.devices.mesh import one_device_mesh
from train.devices.rules import TRAINING

T = 256
CHANGES = [{}, {"sliding_window": 40}, {"attention_softcap": 2.0}, {"num_kv_heads": 4}, {"num_kv_heads": 1}]
SINKS = {"attention_sinks": True}


def config_for(kernel: str, **changes: object) -> ModelConfig:
    return small_model(**({"head_dim": 16, "attention_kernel": kernel} | changes))


def inputs(config: ModelConfig, rows: int = 2, seed: int = 0):
    """Returns q, k, v, the gradient of the result, and segments that begin inside blocks and at their ends."""
    random = np.random.default_rng(seed)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    q, k, v, g = (random.normal(size=(rows, n, T, config.head_dim)).astype(np.float32) for n in heads)
    begins = random.random((rows, T)) < 0.02
    begins[:, [0, 128]] = True
    return q, k, v, g, np.cumsum(begins, axis=1, dtype=np.int32)


def result_and_gradients(config: ModelConfig, mesh, layout, arrays, dtype=jnp.float32):
    """Returns attention's result and gradients on a mesh, in the order of the rows."""
    with jax.set_mesh(mesh):
        order = zigzag_order(T, layout)
        axes = [("batch", heads, "time", None) for heads in ("heads", "kv_heads", "kv_heads", "heads")]
        q, k, v, g = (
            jax.device_put(jnp.asarray(x[:, :, order], dtype), layout.spec(*names))
            for x, names in zip(arrays[:4], axes, strict=True)
        )
        ids = jax.device_put(arrays[4][:, order], layout.spec("batch", "time"))

        sinks = [jnp.linspace(-1, 3, config.num_heads)] if config.attention_sinks else []
        sinks = [jax.device_put(sink, layout.spec("heads")) for sink in sinks]

        @jax.jit
        def both(q, k, v, g, ids, *sinks):
            attention = attention_over(config, layout, ids, config.sliding_window)
            y, pull = jax.vjp(lambda q, k, v, *sinks: attention(q, k, v, None, *sinks), q, k, v, *sinks)
            return y, *pull(g)

        actual = [np.asarray(x, np.float32) for x in both(q, k, v, g, ids, *sinks)]
    return [x[:, :, np.argsort(order)] if x.ndim > 1 else x for x in actual]


def plain_attention(**changes: object):
    """Returns inputs, and what plain attention on one device makes of them."""
    return _plain_attention(config_for("plain", **changes), T)


@functools.cache
def _plain_attention(config: ModelConfig, T: int):
    arrays = inputs(config)
    return arrays, result_and_gradients(config, mesh_of(), TRAINING, arrays)


def result_and_changed_result(config: ModelConfig, mesh, arrays, changed):
    """Returns attention's results of two inputs of one row, by one program."""
    rows = [np.concatenate(pair) for pair in zip(arrays, changed, strict=True)]
    return np.split(result_and_gradients(config, mesh, TRAINING, rows)[0], 2)


def assert_close(actual, expected, tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < tolerance


@pytest.mark.parametrize("changes", [*CHANGES, SINKS], ids=str)
def test_splash_attention_is_plain_attention(changes: dict):
    arrays, plain = plain_attention(**changes)
    splash = result_and_gradients(config_for("splash", **changes), mesh_of(), TRAINING, arrays)
    assert_close(splash, plain, 2e-6)


@pytest.mark.parametrize("changes", [{}, SINKS], ids=str)
def test_a_block_whose_keys_are_computed_in_parts_gives_the_same(changes: dict, monkeypatch):
    arrays, plain = plain_attention(**changes)
    monkeypatch.setattr(model.kernels, "_block", lambda *_: T)
    monkeypatch.setattr(model.kernels, "KEYS_AT_ONCE", T // 2)
    splash = result_and_gradients(config_for("splash", **changes), mesh_of(), TRAINING, arrays)
    assert_close(splash, plain, 2e-6)


@pytest.mark.parametrize("shape", [{}, {"context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 40}, {"sliding_window": 2}, {"sliding_window": 2 * T}, {"num_kv_heads": 4}],
    ids=str,
)
def test_what_cudnn_is_asked_for_is_plain_attention(shape: dict, changes: dict, monkeypatch):
    """XLA's own attention stands in for cuDNN's, which only a GPU has."""
    arrays, plain = plain_attention(**changes)
    real = jax.nn.dot_product_attention
    asked = []

    def stand_in(*qkv, implementation: str, **options):
        asked.append(implementation)
        return real(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(model.kernels, "choose_kernel", lambda *_: KernelChoice("cudnn", ""))
    cudnn = result_and_gradients(config_for("plain", **changes), mesh_of(**shape), TRAINING, arrays)
    # Where positions are shared, the earlier half of a row is asked for apart.
    assert asked == ["cudnn"] * (2 if shape else 1)
    assert_close(cudnn, plain, 2e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_gets_the_window_and_computes_no_gradient_of_the_mask(window: int | None, monkeypatch):
    """Programs for a GPU are lowered without one."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(model.kernels, "choose_kernel", lambda *_: KernelChoice("cudnn", ""))
    config = config_for("plain")
    q, k, v, g, ids = inputs(config)

    def both(q, k, v, g):
        attention = attention_over(config, UNSHARDED, ids, window)
        y, pull = jax.vjp(lambda *x: attention(*x, None), q, k, v)
        return y, *pull(g)

    arrays = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, g))
    text = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert len(calls) == 2
    for call in calls:
        masks_in, masks_out = (part.count(f"tensor<2x1x{T}x{T}xbf16>") for part in call.rsplit("->", 1))
        assert (masks_in, masks_out) == (1, 0)
        settings = json.loads(re.search(r'backend_config = "(.*?)", ', call)[1].replace(r"\22", '"'))
        settings = settings["cudnn_fmha_backend_config"]
        assert (settings["mask_type"], settings["sliding_window_length"]) == ("CAUSAL", window or 0)


def test_splash_attention_in_bfloat16_is_as_near_as_plain_attention_is():
    arrays, exact = plain_attention()
    actual = result_and_gradients(config_for("splash"), mesh_of(), TRAINING, arrays, jnp.bfloat16)
    assert_close(actual, exact, 1e-2)


@pytest.mark.parametrize("kernel", ["plain", "splash"])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 40} | SINKS], ids=str)
def test_devices_that_share_rows_heads_and_positions_give_the_same(shape: dict, kernel: str, changes: dict):
    arrays, expected = plain_attention(**changes)
    actual = result_and_gradients(config_for(kernel, **changes), mesh_of(**shape), TRAINING, arrays)
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("kernel", ["plain", "splash"])
def test_later_positions_and_other_segments_change_no_bit(kernel: str):
    config = config_for(kernel)
    q, k, v, g, ids = inputs(config, rows=1)
    place = 100
    other = np.arange(T) > place
    other |= ids[0] != ids[0, place]
    changed = [np.where(other[:, None], x + 1, x).astype(np.float32) for x in (q, k, v)]
    before, after = result_and_changed_result(config, mesh_of(), (q, k, v, g, ids), (*changed, g, ids))
    np.testing.assert_array_equal(before[:, :, place], after[:, :, place])
    assert np.abs(before[:, :, -1] - after[:, :, -1]).max() > 1e-3


@pytest.mark.parametrize("kernel", ["plain", "splash"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 40}, SINKS], ids=str)
def test_a_packed_document_has_the_results_that_it_has_alone(kernel: str, changes: dict):
    config = config_for(kernel, **changes)
    q, k, v, g, ids = inputs(config, rows=1)
    inside = ids[0] == ids[0, 128]
    alone = np.where(inside, 1, 2)[None].astype(np.int32)
    random = np.random.default_rng(9)
    others = [np.where(inside[:, None], x, random.normal(size=x.shape)).astype(np.float32) for x in (q, k, v)]
    packed, single = result_and_changed_result(config, mesh_of(), (q, k, v, g, ids), (*others, g, alone))
    np.testing.assert_allclose(packed[:, :, inside], single[:, :, inside], atol=1e-6)


def test_devices_that_share_the_positions_have_equal_causal_work():
    with jax.set_mesh(mesh_of(context=4)):
        order = zigzag_order(64, TRAINING)
    assert sorted(order) == list(range(64))
    assert len({int(np.sum(part + 1)) for part in order.reshape(4, 16)}) == 1


def platform(name: str):
    """Returns an abstract mesh of a platform that this machine lacks, for `choose_kernel`."""
    kind = {"tpu": "TPU v5e", "gpu": "NVIDIA H100"}[name]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=name)
    return jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Explicit,), abstract_device=device)


@pytest.mark.parametrize(
    ("name", "changes", "length", "kernel", "words"),
    [
        ("tpu", {}, 256, "splash", "on tpu"),
        ("tpu", {"attention_softcap": 3.0, "sliding_window": 9}, 256, "splash", "on tpu"),
        ("tpu", {}, 200, "plain", "not splash: 200 positions a device are not a multiple of 128"),
        ("gpu", {"compute_dtype": "bfloat16"}, 201, "plain", "201 positions a device are not a multiple of 2"),
        ("tpu", {"attention_dropout": 0.1}, 256, "plain", "not splash: model.attention_dropout"),
        ("gpu", {"compute_dtype": "bfloat16"}, 256, "cudnn", "on gpu"),
        ("gpu", {"compute_dtype": "bfloat16", "attention_dropout": 0.1}, 256, "plain", "model.attention_dropout"),
        ("gpu", {"compute_dtype": "bfloat16", "attention_softcap": 3.0}, 256, "plain", "model.attention_softcap"),
        ("gpu", {"compute_dtype": "bfloat16", "head_dim": 256}, 256, "plain", "model.head_dim = 256"),
        ("gpu", {"compute_dtype": "bfloat16"} | SINKS, 256, "plain", "which model.attention_sinks add to"),
        ("gpu", {}, 256, "plain", "model.compute_dtype is float32"),
    ],
)
def test_the_choice_follows_the_platform_and_says_why(name: str, changes: dict, length: int, kernel: str, words: str):
    config = config_for("auto", **changes)
    with jax.sharding.use_abstract_mesh(platform(name)):
        actual = choose_kernel(config, UNSHARDED, length)
        assert actual.kernel == kernel
        assert words in str(actual)
        if kernel == "plain":
            asked = dataclasses.replace(config, attention_kernel={"tpu": "splash", "gpu": "cudnn"}[name])
            with pytest.raises(ValueError, match="leave it at auto"):
                choose_kernel(asked, UNSHARDED, length)


def test_on_a_cpu_there_is_no_kernel():
    assert str(choose_kernel(config_for("auto"), UNSHARDED, 256)) == "plain (there is no kernel for cpu)"


@pytest.mark.parametrize("mesh", [mesh_of, lambda: platform("tpu")])
def test_cudnn_is_refused_where_there_is_no_gpu(mesh):
    config = config_for("cudnn", compute_dtype="bfloat16")
    made = mesh()
    with (
        jax.sharding.use_abstract_mesh(getattr(made, "abstract_mesh", made)),
        pytest.raises(ValueError, match="none for"),
    ):
        choose_kernel(config, UNSHARDED, 256)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_on_one_cpu_plain_attention_in_blocks_is_that_of_the_whole(changes: dict, monkeypatch):
    config = config_for("plain", **changes)
    arrays = inputs(config)

    def both() -> list[np.ndarray]:
        return result_and_gradients(config, one_device_mesh(), UNSHARDED, arrays)

    with jax.set_mesh(one_device_mesh()):
        monkeypatch.setattr(model.cpu_attention, "LEAST_BLOCK", 64)
        attention = attention_over(config, UNSHARDED, arrays[4], config.sliding_window)
        jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, None))(*map(jnp.asarray, arrays[:3]))
    assert f"{T // 4},{T // 2}]" in str(jaxpr)
    assert f"{T},{T}]" not in str(jaxpr).split("dot_general", 1)[1]
    in_blocks = both()
    monkeypatch.setattr(model.kernels, "on_one_cpu", lambda: False)
    assert_close(in_blocks, both(), 2e-6)


def test_a_length_that_blocks_do_not_divide_is_attended_to_as_a_whole():
    positions = model.cpu_attention.LEAST_BLOCK + 6
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, positions, 8)).astype(np.float32)
    mask = causal_mask(jnp.ones((1, positions), jnp.int32), None, UNSHARDED)
    whole = attend(q, k, v, mask)
    np.testing.assert_allclose(model.cpu_attention.attend_in_blocks(q, k, v, mask), whole, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 512, 700])
@pytest.mark.parametrize(("T", "shards"), [(768, 1), (8192, 1), (8192, 4), (4096, 8), (2048, 4), (6144, 4)])
def test_the_pairs_that_splash_attention_visits_are_those_of_its_own_table(T: int, shards: int, window: int | None):
    mask = splash_attention_mask.CausalMask((T, T), shard_count=shards)
    if window is not None:
        mask = splash_attention_mask.LocalMask((T, T), (window - 1, 0), 0, shards)
    with jax.set_mesh(mesh_of(context=shards)):
        mask.q_sequence = zigzag_order(T, TRAINING)
    # In zigzag order a device has two pieces.
    piece = T if shards == 1 else T // shards // 2
    block = max(size for size in (128, 256, 512, 1024) if piece % size == 0 and (4 * size <= T or size == 128))
    table, _ = process_mask(splash_attention_mask.MultiHeadMask([mask]), (block, block), q_seq_shards=shards)
    assert visited_pairs("splash", T, window, shards) * shards == np.count_nonzero(table.block_mask) * block**2


def test_wide_heads_have_blocks_that_fit_the_vector_memory():
    assert visited_pairs("splash", 8192, None, 1) == 36 * 1024**2
    assert visited_pairs("splash", 8192, None, 1, is_wide=True) == 136 * 512**2
    assert has_one_backward_kernel(8192, None, 1)
    assert not has_one_backward_kernel(8192, None, 1, is_wide=True)
    assert not has_one_backward_kernel(8192, 1024, 1)


def test_the_pairs_that_cudnn_visits_are_those_of_the_mask_unless_positions_are_shared():
    assert visited_pairs("cudnn", 6, None, 1) == 21
    assert visited_pairs("cudnn", 6, 2, 1) == 11
    # Two devices: the earlier half of the row to itself, the later one to all.
    assert visited_pairs("cudnn", 8, 2, 2) == (4 * 4 + 4 * 8) // 2
    assert visited_pairs("plain", 8, None, 2) == 8 * 8 // 2
