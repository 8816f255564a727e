"""The model of time, held against figures that others have measured."""

from dataclasses import replace

import pytest

from train.devices.hardware import CHIPS
from train.planning.hlo import Array
from train.planning.operations import Kernel, Operation
from train.planning.speed import LARGEST_ERROR, VECTOR_OPERATIONS, own_seconds, reached, seconds_range

V6E, V5E, H100 = CHIPS["v6e"], CHIPS["v5e"], CHIPS["h100"]
# Of 3 rows of 8,192 positions in blocks of 2,048, for 32 heads of 128.
HEADS = Array("bf16", (3, 32, 8192, 128))
SOURCE = f"attention_pairs_{10 * 2048**2}/splash"


def kernel(name: str, results: int, head: Array = HEADS, source: str = SOURCE) -> Operation:
    """The third result is a sum of the queries' gradients for each block of keys."""
    sums = Array(head.dtype, (head.dims[0], 4, *head.dims[1:]))
    return Operation(name, kernel=Kernel(name, (head, head, head), (head, head, sums)[:results], None, source))


@pytest.mark.parametrize(
    ("name", "results", "measured"), [("splash_mha_fwd", 1, 9.41e-3), ("splash_mha_dkv", 3, 13.87e-3)]
)
def test_splash_attention_takes_on_a_v6e_what_was_measured(name: str, results: int, measured: float):
    assert own_seconds(kernel(name, results), V6E) == pytest.approx(measured, rel=0.05)


def test_where_products_take_longer_than_the_softmax_they_count():
    forward = kernel("splash_mha_fwd", 1)
    assert forward.kernel
    scores = 3 * 32 * 10 * 2048**2
    assert forward.kernel.scores == scores
    slow = scores * VECTOR_OPERATIONS[0] / (4096 * 1.5e9)
    assert own_seconds(forward, V5E) == pytest.approx(max(slow, 2 * 2 * scores * 128 / 197e12))
    # Heads of 256 have twice the products for each score.
    wide = kernel("splash_mha_fwd", 1, Array("bf16", (3, 32, 8192, 256)))
    assert own_seconds(wide, V5E) == pytest.approx(2 * 2 * scores * 256 / 197e12)


def test_a_gpu_reaches_shares_of_its_data_sheet():
    shares = reached(H100)
    assert own_seconds(Operation("product", flops=989e12), H100) == pytest.approx(1 / shares.products)
    assert own_seconds(Operation("sum", bytes=3_352_000_000), H100) == pytest.approx(1e-3 / shares.memory)
    arrays = Array("bf16", (1, 8192, 32, 128))
    forward = kernel("__cudnn$fmhaScaleBiasSoftmax", 1, arrays, "attention_pairs_1000000")
    assert own_seconds(forward, H100) == pytest.approx(4 * 32e6 * 128 / 989e12 / shares.forward)
    backward = kernel("__cudnn$fmhaScaleBiasSoftmaxBackward", 3, arrays, "attention_pairs_1000000")
    assert own_seconds(backward, H100) == pytest.approx(10 * 32e6 * 128 / 989e12 / shares.backward)
    assert 0.4 < shares.backward <= shares.forward <= shares.products < 0.8


def test_a_backward_kernel_that_leaves_the_queries_gradients_has_one_product_less():
    scratch = Array("f32", (3, 2, 1024, 128))
    split = Kernel("splash_mha_dkv", (HEADS,) * 3, (HEADS, HEADS, scratch, scratch), None, SOURCE)
    fused = kernel("splash_mha_dkv", 3).kernel
    assert fused
    assert (split.attention_products, fused.attention_products) == (4, 5)


def test_a_device_that_was_measured_reaches_its_own_figures_and_has_no_range():
    mine = replace(H100, name="NVIDIA L4", peak_flops=1e14)
    assert own_seconds(Operation("product", flops=1e14), mine) == pytest.approx(1.0)
    assert seconds_range(1.0, mine) is None


def test_a_range_has_the_seconds_that_the_largest_error_allows():
    least, most = seconds_range(2.0, V5E) or (0, 0)
    assert 2.0 / least - 1 == pytest.approx(LARGEST_ERROR["tpu"])
    assert 2.0 / most - 1 == pytest.approx(-LARGEST_ERROR["tpu"])


def test_a_chip_that_no_measured_step_was_held_against_has_a_wider_range():
    (least, most), (known_least, known_most) = (seconds_range(1.0, chip) or (0, 0) for chip in (CHIPS["tpu7x"], V5E))
    assert least < known_least < 1 < known_most < most
