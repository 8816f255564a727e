"""Figures of accelerators, against their makers' data sheets and against each other."""

import pytest

from train.devices.hardware import CHIPS, chip_of
from train.planning.topology import GPUS

# Dense bfloat16 products: FLOPs of a cycle of one unit, units (multiprocessors, or matrix units of a TPU), cycles/s.
PEAKS = {
    "v4": (2 * 128**2, 2 * 4, 1.05e9),
    "v5e": (2 * 128**2, 4, 1.5e9),
    "v5p": (2 * 128**2, 2 * 4, 1.75e9),
    "v6e": (2 * 256**2, 2 * 2, 1.75e9),
    "tpu7x": (2 * 256**2, 2 * 2, 2.2e9),
    "a100": (2048, 108, 1.41e9),
    "h100": (4096, 132, 1.83e9),
    "h200": (4096, 132, 1.83e9),
    "b200": (8192, 148, 1.855e9),
}
# Data sheets: memory in GB (of a TPU in GiB), its GB/s, GB/s of all links one way, Gbit/s of the network. Of a TPU7x,
# which is two devices, a half but for the links, which both share.
SHEETS = {
    "v4": (32, 1200, 6 * 50, 50),
    "v5e": (16, 819, 4 * 50, 25),
    "v5p": (95.74, 2765, 600, 50),
    "v6e": (32, 1638, 400, 100),
    "tpu7x": (192 / 2, 7380 / 2, 600, 100 / 2),
    "a100": (85.9, 2039, 300, 200),
    "h100": (85.9, 3352, 450, 400),
    "h200": (151.9, 4800, 450, 400),
    "b200": (192, 7672, 900, 400),
}


@pytest.mark.parametrize("name", CHIPS)
def test_the_peak_is_that_of_the_units_that_multiply_dense_bfloat16(name: str):
    flops, units, cycles = PEAKS[name]
    assert CHIPS[name].peak_flops == pytest.approx(flops * units * cycles, rel=0.005)
    assert CHIPS[name].cycles_per_second in (0.0, cycles)
    assert (CHIPS[name].cycles_per_second > 0) == (CHIPS[name].platform == "tpu")


@pytest.mark.parametrize("name", CHIPS)
def test_products_of_8_bits_take_half_the_time(name: str):
    chip = CHIPS[name]
    assert bool(chip.matmul_dtypes) == (chip.eight_bit_flops > 0) == (name != "v4")
    assert chip.product_seconds(chip.peak_flops) == 1
    assert chip.product_seconds(3 * chip.peak_flops, 2 * chip.peak_flops) == pytest.approx(
        1 + 2 * (1 if name == "v4" else 1 / 2), rel=2e-3
    )


@pytest.mark.parametrize("name", CHIPS)
def test_memory_links_and_network_are_those_of_the_data_sheet(name: str):
    chip = CHIPS[name]
    memory, bandwidth, links, network = SHEETS[name]
    # The compiler, or the driver, keeps a little of the memory.
    assert 0.95 < chip.memory_bytes / (memory * (2**30 if chip.platform == "tpu" else 1e9)) <= 1
    assert chip.memory_bandwidth == bandwidth * 1e9
    # A ring uses two links of a TPU, one in each direction; v5e and v6e have four, the others six.
    rings = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}.get(name, 1)
    assert chip.link_bandwidth == links * 1e9 / rings
    assert chip.network_bandwidth == network * 1e9 / 8
    assert chip.host_bandwidth in (16e9, 32e9, 64e9)
    # The dies of a TPU7x are linked six times as fast as chips are, one way.
    assert chip.die_bandwidth == (6 * chip.link_bandwidth / 2 if name == "tpu7x" else 0)
    assert chip.devices == (2 if name == "tpu7x" else 1)


def test_each_of_jaxs_names_is_one_chip_and_other_names_are_none():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    assert all(chip_of(kind) == chip for chip in CHIPS.values() for kind in chip.device_kinds)
    assert chip_of("cpu") is None


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_plans_for_the_same_multiprocessors(name: str):
    cores, units, *_, clock, _, _ = GPUS[name]
    assert cores == PEAKS[name][1]
    assert units in (64, 128)
    assert PEAKS[name][2] <= clock * 1e9 <= 1.1 * PEAKS[name][2]
