"""Ring attention is attention on one device: results, gradients, documents, and the choice of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels import choose_kernel, visited_pairs
from tests.model import test_kernels as kernels
from tests.model.test_kernels import SINKS, assert_close, config_for, plain_attention, result_and_gradients
from tests.small import mesh_of
from train.devices.rules import TRAINING

MIXED = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.fixture(autouse=True)
def positions(monkeypatch, request):
    """Splash attention has at least 128 positions in each of the 2n pieces of a row."""
    T = getattr(request, "param", 256)
    monkeypatch.setattr(kernels, "T", T)
    return T


def both(kernel: str, shape: dict[str, int], changes: dict, dtype=jnp.float32):
    """Returns result and gradients by ring attention on a mesh, and by plain attention on one device in float32."""
    arrays, expected = plain_attention(**changes)
    config = config_for(kernel, context_attention="ring", **changes)
    return result_and_gradients(config, mesh_of(**shape), TRAINING, arrays, dtype), expected


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({"context": 2}, {}),
        ({"context": 4}, {"num_kv_heads": 1}),
        ({"context": 4}, {"attention_softcap": 2.0, "num_kv_heads": 4} | SINKS),
        (MIXED, SINKS),
        ({"context": 2}, {"sliding_window": 2}),
        ({"context": 4}, {"sliding_window": 33}),
        (MIXED, {"sliding_window": 40} | SINKS),
    ],
    ids=str,
)
def test_a_ring_of_plain_attention_is_one_device(shape: dict, changes: dict):
    assert_close(*both("plain", shape, changes), 2e-6)


@pytest.mark.parametrize(
    ("positions", "shape", "changes"),
    [
        (512, {"context": 2}, {}),
        (1024, {"context": 4}, {"attention_softcap": 2.0, "num_kv_heads": 1}),
        (512, {"context": 2, "tensor": 2}, SINKS),
        (512, {"context": 2}, {"sliding_window": 40}),
    ],
    indirect=["positions"],
    ids=str,
)
def test_a_ring_of_splash_attention_is_one_device(positions: int, shape: dict, changes: dict):
    assert_close(*both("splash", shape, changes), 2e-6)


@pytest.mark.parametrize(("positions", "kernel"), [(256, "plain"), (512, "splash")], indirect=["positions"])
def test_in_bfloat16_a_ring_is_as_near_as_plain_attention_is(positions: int, kernel: str):
    assert_close(*both(kernel, {"context": 2}, {}, jnp.bfloat16), 1e-2)


@pytest.mark.parametrize(("positions", "kernel"), [(256, "plain"), (512, "splash")], indirect=["positions"])
def test_later_positions_and_other_segments_change_no_bit_of_a_ring(positions: int, kernel: str):
    config = config_for(kernel, context_attention="ring")
    q, k, v, g, ids = kernels.inputs(config, rows=1)
    place = positions // 2 + 40
    other = (np.arange(positions) > place) | (ids[0] != ids[0, place])
    changed = [np.where(other[:, None], x + 1, x).astype(np.float32) for x in (q, k, v)]
    before, after = kernels.result_and_changed_result(config, mesh_of(context=2), (q, k, v, g, ids), (*changed, g, ids))
    np.testing.assert_array_equal(before[:, :, place], after[:, :, place])
    assert np.abs(before[:, :, -1] - after[:, :, -1]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "context", "length", "words"),
    [
        ({}, 1, 16384, "plain (there is no kernel for cpu)"),
        ({}, 4, 65536, "ring of keys (16,384 FLOPs a byte sent)"),
        ({"num_kv_heads": 4}, 4, 65536, "all-gather of keys (no ring: it would have 8,192 FLOPs a byte sent, below"),
        ({"context_attention": "ring"}, 4, 16, "ring of keys (model.context_attention asks for it)"),
        ({"context_attention": "all_gather"}, 4, 16384, "all-gather of keys (model.context_attention asks for it)"),
        ({"sliding_window": 8193}, 4, 65536, "ring of keys (16,384 FLOPs a byte sent)"),
        ({"sliding_window": 8194}, 4, 65536, "no ring: model.sliding_window = 8194 is longer than pieces of 8192"),
        ({"attention_dropout": 0.1}, 4, 16384, "no ring: model.attention_dropout"),
    ],
    ids=str,
)
def test_the_choice_of_a_ring_says_why(changes: dict, context: int, length: int, words: str):
    with jax.set_mesh(mesh_of(context=context)):
        assert words in str(choose_kernel(config_for("auto", **changes), TRAINING, length))


@pytest.mark.parametrize(
    ("kernel", "changes", "length", "words"),
    [
        ("plain", {"sliding_window": 130}, 1024, "model.sliding_window = 130 is longer than pieces of 128 positions"),
        ("plain", {"attention_dropout": 0.1}, 1024, "model.attention_dropout"),
        ("splash", {}, 512, "pieces of 64 positions are not a multiple of 128"),
    ],
)
def test_a_ring_that_cannot_be_is_refused(kernel: str, changes: dict, length: int, words: str):
    config = config_for(kernel, context_attention="ring", **changes)
    with jax.set_mesh(mesh_of(context=4)), pytest.raises(ValueError, match=f"ring: {words}.*leave it at auto"):
        choose_kernel(config, TRAINING, length)


@pytest.mark.parametrize("shards", [2, 8])
def test_a_ring_computes_the_pairs_of_causal_attention_and_of_the_blocks_at_its_diagonal(shards: int):
    T, block = 16384 * shards, 1024
    # All pairs before the diagonal blocks once, and these blocks whole, in the share of each device.
    causal = (T // block) * (T // block + 1) // 2 * block**2
    assert visited_pairs("splash", T, None, shards, True) * shards == causal
    assert visited_pairs("plain", 16, None, 4, True) == 4 * 4 + 3 * 2 * 2 * 2


def test_halos_are_counted_in_the_blocks_that_a_window_reaches():
    # In pieces of 1024 positions blocks have 256; a window of 258 reaches two blocks before that of the query.
    assert visited_pairs("splash", 4096, 257, 2, True) == 2 * 1024 * (256 + 256)
    assert visited_pairs("splash", 4096, 258, 2, True) == 2 * 1024 * (512 + 256)
    assert visited_pairs("plain", 64, 5, 2, True) == 2 * 16 * (4 + 16)
