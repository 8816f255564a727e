"""What is read from compiled programs: against counts by hand, in programs of each compiler and in small excerpts."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.peers import require
from train.devices.hardware import CHIPS
from train.planning.hlo import Array
from train.planning.operations import Collective, Operation, Program, total, walked
from train.planning.reader import read_program
from train.planning.timeline import Timeline, timeline
from train.planning.topology import topology_devices, without_jax_cache

MESH = {"slice": 1, "data": 2, "fsdp": 4, "tensor": 2}
L, M, D, F = 5, 3, 128, 256
SHORT = {"float32": "f32", "bfloat16": "bf16"}
CHIP = replace(CHIPS["v5e"], cycles_per_second=1e6, peak_flops=1e9, memory_bandwidth=1e9, host_bandwidth=1e7)


def module(entry: str, others: str = "", head: str = "") -> str:
    """An excerpt of XLA's text."""
    return f"HloModule jit_f, is_scheduled=true{head}\n\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}\n"


def read(entry: str, others: str = "", head: str = "") -> Program:
    return read_program(module(entry, others, head), MESH)


def simulated(program: Program) -> Timeline:
    return timeline(program, CHIP, lambda axes: 1e6 if "slice" in axes else 1e8)


def asynchronous(program: Program) -> list[bool]:
    """For each collective, whether other operations may run meanwhile."""
    return [operation.asynchronous for operation, _ in walked(program.operations) if operation.collective]


def payloads(program: Program) -> dict[tuple[str, tuple[str, ...], str], int]:
    total: Counter = Counter()
    for collective in program.collectives:
        total[collective.kind, collective.axes, collective.dtype] += collective.payload_bytes * collective.count
    return dict(total)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("{{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[16]", ("tensor",)),
        ("[8,2]<=[2,8]T(1,0)", ("data",)),
        ("[2,8]<=[8,2]T(1,0)", ("data", "fsdp")),
        ("mesh['slice'=1,'data'=2,'fsdp'=4,'tensor'=2] {'fsdp','tensor'}", ("fsdp", "tensor")),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(1)2}", ("data",)),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(2)4}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_0'}", ("tensor",)),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_groups_in_each_notation_are_known_by_their_mesh_axes(groups: str, axes: tuple[str, ...]):
    program = read(
        "  %p = f32[10]{0} parameter(0)\n"
        f"  ROOT %r = f32[10]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, "
        'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/psum"}'
    )
    (collective,) = program.collectives
    assert collective.axes == axes
    assert collective.group == np.prod([MESH[axis] for axis in axes])
    assert collective.payload_bytes == 40
    assert collective.sent_bytes == pytest.approx(2 * 40 * (collective.group - 1) / collective.group)
    assert (collective.source, asynchronous(program)) == ("jit(f)/psum", [False])


def test_a_permute_moves_along_the_axes_of_its_pairs_and_not_at_all_in_place():
    line = "  %p = bf16[6]{0} parameter(0)\n  ROOT %r = bf16[6]{0} collective-permute(%p), source_target_pairs="
    (collective,) = read(line + "{{0,2},{2,4},{4,6},{6,0}}").collectives
    assert (collective.kind, collective.axes, collective.sent_bytes) == ("permute", ("fsdp",), 12)
    assert read(line + "{{0,0},{1,1}}").collectives == ()
    empty = read(line + "{}")
    assert empty.collectives == ()
    assert "all zeros" in empty.notes[0]


COUNTED = """
%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
}

%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %most = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %most), direction=LT
}
"""


def test_a_loop_counts_from_its_first_to_its_last_trip():
    entry = (
        "  %zero = s32[] constant({})\n  %x = f32[4,8]{{1,0}} parameter(0)\n"
        "  %t = (s32[], f32[4,8]{{1,0}}) tuple(%zero, %x)\n"
        "  ROOT %w = (s32[], f32[4,8]{{1,0}}) while(%t), condition=%condition, body=%body{}"
    )
    once = 2 * 4 * 8 * 8
    assert total(read(entry.format(0, ""), COUNTED).operations, "flops") == 7 * once
    assert total(read(entry.format(2, ""), COUNTED).operations, "flops") == 5 * once
    in_twos = read(entry.format(0, ""), COUNTED.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert total(in_twos.operations, "flops") == 4 * once
    for last in range(6, 9):
        for step in (1, 2, 3):
            body = COUNTED.replace("%one = s32[] constant(1)", f"%one = s32[] constant({step})")
            body = body.replace("constant(7)", f"constant({last})")
            for direction, end in (("LT", last), ("LE", last + 1)):
                program = read(entry.format(0, ""), body.replace("direction=LT", f"direction={direction}"))
                assert total(program.operations, "flops") == len(range(0, end, step)) * once
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    assert total(read(entry.format(0, known), COUNTED).operations, "flops") == 3 * once
    unknown = read(entry.format(0, ""), COUNTED.replace("constant(7)", "add(%i.1, %i.1)"))
    assert total(unknown.operations, "flops") == once
    assert unknown.notes == ("w: the program does not state its trip count; it is counted once",)


def test_loops_multiply_and_of_branches_the_worst_counts():
    others = COUNTED + (
        "\n%outer (t: f32[]) -> f32[] {\n  %t.1 = (s32[], f32[4,8]{1,0}) parameter(0)\n"
        "  ROOT %w.1 = (s32[], f32[4,8]{1,0}) while(%t.1), condition=%condition, body=%body,"
        ' backend_config={"known_trip_count":{"n":"7"}}\n}\n'
        "\n%light (x: f32[]) -> f32[] {\n  %x.2 = f32[4,8]{1,0} parameter(0)\n"
        "  ROOT %y.2 = f32[4,4]{1,0} dot(%x.2, %x.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n}\n"
    )
    program = read(
        "  %t = (s32[], f32[4,8]{1,0}) parameter(0)\n  %which = s32[] constant(0)\n"
        '  %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%outer, backend_config={"known_trip_count"'
        ':{"n":"2"}}\n'
        "  ROOT %c = (s32[], f32[4,8]{1,0}) conditional(%which, %t, %t), branch_computations={%light, %outer}",
        others,
    )
    assert total(program.operations, "flops") == (2 * 7 + 7) * 2 * 4 * 8 * 8
    assert program.instructions == 8 + 4 + 2 + 2 + 4


@pytest.mark.parametrize(
    ("line", "M_N_K_times"),
    [
        # Plain; a batch dimension as a window that slides by itself; heads that are contracted as a window.
        ("f32[4,9] convolution(f[4,6], g[6,9]), dim_labels=bf_io->bf", 4 * 9 * 6),
        ("f32[3,4,9] convolution(f[3,4,6], g[6,9,3]), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
         "dim_labels=0bf_io0->0bf", 3 * 4 * 9 * 6),
        ("f32[1,4,9] convolution(f[5,4,6], g[5,6,9]), window={size=5}, dim_labels=0bf_0io->0bf", 4 * 9 * 6 * 5),
        # What is padding is no work: four heads of the one operand slide over the other's single one.
        ("f32[4,8,2,10] convolution(f[6,2,10,1], g[4,6,8,1]), window={size=4x1 pad=3_3x0_0 rhs_reversal=1x0}, "
         "dim_labels=f1b0_0io1->0f1b", None),
        ("f32[4,9] dot(f[4,6], g[9,6]), lhs_contracting_dims={1}, rhs_contracting_dims={1}", 4 * 9 * 6),
        ('(f32[4,9], s8[99]) custom-call(f[6,4], g[6,9]), custom_call_target="__cublas$lt$matmul", backend_config='
         '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}', 4 * 9 * 6),
        ('f32[4,9] custom-call(f[4,6], g[6,9]), custom_call_target="__onednn$matmul"', 4 * 9 * 6),
    ],
)  # fmt: skip
def test_a_matrix_product_is_two_flops_for_each_of_its_terms_however_it_is_written(line: str, M_N_K_times: int | None):
    left, right = (part.split("]")[0] for part in line.replace("g[", "f[").split("(f[", 1)[1].split(", f[", 1))
    line = line.replace(f"f[{left}]", "%x").replace(f"g[{right}]", "%y")
    program = read(f"  %x = f32[{left}] parameter(0)\n  %y = f32[{right}] parameter(1)\n  ROOT %z = {line}")
    if M_N_K_times:
        assert total(program.operations, "flops") == 2 * M_N_K_times
    else:
        assert total(program.operations, "flops") == 2 * 10 * 6 * 8 * (2 * 4)
    assert not program.kernels


@pytest.mark.parametrize(("dtype", "share"), [("s8", 1), ("f8e4m3fn", 1), ("f8e5m2", 1), ("bf16", 0), ("f32", 0)])
def test_products_of_8_bits_are_counted_apart_at_their_own_rate(dtype: str, share: int):
    product = "dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    x, y = (f"{dtype}[400,400]{{1,0}} parameter({number})" for number in (0, 1))
    program = read(f"  %x = {x}\n  %y = {y}\n  ROOT %z = f32[400,400]{{1,0}} {product}")
    flops = total(program.operations, "flops")
    assert total(program.operations, "eight_bit_flops") == share * flops == share * 2 * 400**3
    chip = replace(CHIP, eight_bit_flops=2e9)
    assert timeline(program, chip, lambda axes: 1.0).compute == flops / 1e9 / (1 + share)


GPU = """  %p = bf16[16,8]{1,0} parameter(0)
  %q = bf16[4,8]{1,0} parameter(1)
  %start = ((bf16[16,8]{1,0}, bf16[4,8]{1,0}), (bf16[32,8]{1,0}, bf16[8,8]{1,0})) all-gather-start(%p, %q), REST
  %other = bf16[16,8]{1,0} fusion(%p), kind=kLoop, calls=%work
  %done = (bf16[32,8]{1,0}, bf16[8,8]{1,0}) all-gather-done(%start)
  %sum = f32[2,2]{1,0} parameter(2)
  %reduce = (f32[2,2]{1,0}) reduce-scatter-start(%sum), replica_groups={{0,1},{2,3}}, backend_config={"is_sync":true}
  ROOT %reduced = f32[1,2]{1,0} reduce-scatter-done(%reduce)"""
WORK = """%work (w: bf16[16,8]) -> bf16[16,8] {
  %w = bf16[16,8]{1,0} parameter(0)
  ROOT %n = bf16[16,8]{1,0} negate(%w)
}
"""


def test_a_start_and_its_done_are_one_collective_of_all_its_arrays():
    rest = 'channel_id=1, replica_groups=[8,2]<=[16], backend_config={"collective_backend_config":{"is_sync":false}}'
    program = read(GPU.replace("REST", rest), WORK)
    assert payloads(program) == {
        ("all-gather", ("tensor",), "bf16"): 2 * (32 * 8 + 8 * 8),
        ("reduce-scatter", ("tensor",), "f32"): 16,
    }
    assert [c.sent_bytes for c in program.collectives] == [320, 8]
    assert asynchronous(program) == [True, False]


TPU = """%start.1 (a: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[16,8]{1,0} all-gather(%a), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
  ROOT %begin = (bf16[4,8]{1,0:S(1)}, bf16[16,8]{1,0:S(1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle.1 (a: bf16[4,8]) -> (f32[4,2], bf16[16,8]) {
  %b = bf16[4,8]{1,0:S(1)} parameter(0)
  %x = bf16[2,8]{1,0:S(1)} parameter(1)
  %gather.2 = bf16[16,8]{1,0:S(1)} all-gather(%b), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
  %product = f32[4,2]{1,0} convolution(%b, %x), dim_labels=bf_oi->bf
  ROOT %both = (f32[4,2]{1,0}, bf16[16,8]{1,0:S(1)}) tuple(%product, %gather.2)
}

%end.1 (a: bf16[4,8]) -> bf16[16,8] {
  %c = bf16[4,8]{1,0:S(1)} parameter(0)
  %gather.3 = bf16[16,8]{1,0} all-gather(%c), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
  ROOT %finish = bf16[16,8]{1,0:S(1)} custom-call(%c, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (i: bf16[16,8], j: bf16[4]) -> (bf16[4,8], bf16[1]) {
  %i = bf16[16,8]{1,0} parameter(0)
  %j = bf16[4]{0} parameter(1)
  %sums = (bf16[16,8]{1,0}, bf16[4]{0}) all-reduce(%i, %j), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %sum.1 = bf16[16,8]{1,0} get-tuple-element(%sums), index=0
  %part.1 = bf16[4,8]{1,0} dynamic-slice(%sum.1, %place, %zero), dynamic_slice_sizes={4,8}
  %sum.2 = bf16[4]{0} get-tuple-element(%sums), index=1
  %part.2 = bf16[1]{0} dynamic-slice(%sum.2, %place), dynamic_slice_sizes={1}
  ROOT %parts = (bf16[4,8]{1,0}, bf16[1]{0}) tuple(%part.1, %part.2)
}
"""  # noqa: E501
TPU_ENTRY = """  %p = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q = bf16[2,8]{1,0:S(1)} parameter(1)
  %start = (bf16[4,8]{1,0:S(1)}, bf16[16,8]{1,0:S(1)}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start.1
  %go = (f32[4,2]{1,0}, bf16[16,8]{1,0:S(1)}) fusion(%p, %q), kind=kOutput, calls=%middle.1, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %end = bf16[16,8]{1,0:S(1)} fusion(%p), kind=kCustom, calls=%end.1
  %r = bf16[4]{0} parameter(2)
  ROOT %scatter = (bf16[4,8]{1,0}, bf16[1]{0}) fusion(%end, %r), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/reshard"}"""  # noqa: E501


def test_a_gather_that_goes_on_inside_fusions_is_one_and_a_sum_that_is_sliced_is_scattered():
    program = read(TPU_ENTRY, TPU)
    gather, scatter = program.collectives
    assert (gather.kind, gather.axes, gather.payload_bytes) == ("all-gather", ("fsdp",), 256)
    assert (scatter.kind, scatter.axes, scatter.payload_bytes) == ("reduce-scatter", ("fsdp",), 256 + 8)
    assert (asynchronous(program), scatter.source) == ([True, False], "jit(f)/reshard")
    assert total(program.operations, "flops") == 2 * 4 * 2 * 8
    assert total(program.operations, "cycles") == 1500
    told = simulated(program)
    assert told.compute == pytest.approx(1.5e-3)
    assert told.waiting == {("fsdp",): pytest.approx(264 * 3 / 4 / 1e8)}
    assert told.communication == {("fsdp",): pytest.approx((256 + 264) * 3 / 4 / 1e8)}


def test_what_goes_between_slices_is_slow_and_counted_where_it_is_sent():
    attributes = (
        'channel_id={}, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="sum_0",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}}'
    )
    token = "(f32[10]{0}, u32[], token[])"
    text = module(
        "  %p = f32[10]{0} parameter(0)\n  %after = token[] after-all()\n"
        f"  %recv = {token} recv(%after), {attributes.format(1)}\n  %send = {token} send(%p, %after), "
        f"{attributes.format(2)}\n  %sent = token[] send-done(%send)\n"
        "  ROOT %done = (f32[10]{0}, token[]) recv-done(%recv)",
        head=", num_partitions=8",
    )
    program = read_program(text, {"slice": 2, "fsdp": 8})
    (collective,) = program.collectives
    assert (collective.kind, collective.axes, collective.group) == ("all-reduce", ("slice",), 2)
    assert (collective.payload_bytes, asynchronous(program)) == (40, [True])
    assert simulated(program).waiting == {("slice",): pytest.approx(40e-6)}


@pytest.mark.parametrize(
    ("axes", "together"), [((("slice",), ("fsdp",)), True), ((("fsdp",), ("fsdp",)), False)], ids=str
)
def test_traffic_waits_for_other_traffic_on_its_own_links_alone(axes: tuple, together: bool):
    one, other = (Collective("permute", names, 2, "f32", 10**6, "") for names in axes)
    operations = (
        Operation("a", collective=one, asynchronous=True),
        Operation("b", collective=other, asynchronous=True),
        Operation("a-done", waits_for="a"),
        Operation("b-done", waits_for="b"),
    )
    seconds = [1e6 / (1e6 if "slice" in names else 1e8) for names in axes]
    expected = max(seconds) if together else sum(seconds)
    assert simulated(Program(operations, frozenset(), 4, 0, ())).total == pytest.approx(expected)


def test_copies_to_the_host_are_told_from_those_within_the_device():
    program = read(
        "  %p = f32[4,8]{1,0:T(8,128)} parameter(0)\n  %h = f32[9,4,8]{2,1,0:T(8,128)S(5)} parameter(1)\n"
        "  %i = s32[] constant(3)\n"
        "  %out = ((f32[9,4,8]{2,1,0:S(5)}, f32[4,8]{1,0}, s32[]), f32[9,4,8]{2,1,0:S(5)}, u32[]{:S(2)}) "
        "dynamic-update-slice-start(%h, %p, %i)\n"
        "  %fetch = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%p)\n"
        "  %fetched = f32[4,8]{1,0:S(1)} copy-done(%fetch)\n"
        "  %gone = f32[9,4,8]{2,1,0:S(5)} dynamic-update-slice-done(%out)\n"
        "  %in = ((f32[9,4,8]{2,1,0:S(5)}, s32[]), f32[1,4,8]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%gone, %i)\n"
        "  ROOT %back = f32[1,4,8]{2,1,0} dynamic-slice-done(%in)"
    )
    assert total(program.operations, "host_bytes") == 2 * 4 * 8 * 4
    told = simulated(program)
    assert told.memory == pytest.approx(128 / 1e9)
    assert told.transfer == pytest.approx(256 / 1e7)
    assert told.total == pytest.approx(told.host + told.memory)
    assert told.total == pytest.approx(told.transfer)


def test_a_fusion_moves_the_slices_that_it_takes_and_updates():
    fused = """%fused (a: f32[9,4,8], b: f32[9,4,8], i: s32[]) -> f32[9,4,8] {
  %a = f32[9,4,8]{2,1,0} parameter(0)
  %b = f32[9,4,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[1,4,8]{2,1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,4,8}
  ROOT %into = f32[9,4,8]{2,1,0} dynamic-update-slice(%b, %one, %i)
}
"""
    entry = (
        "  %p = f32[9,4,8]{2,1,0} parameter(0)\n  %i.1 = s32[] parameter(1)\n"
        "  ROOT %f = f32[9,4,8]{2,1,0} fusion(%p, %p, %i.1), kind=kLoop, calls=%fused"
    )
    ((operation, times),) = walked(read(entry, fused).operations)
    assert (operation.bytes, times) == (2 * 4 * 8 * 4 + 4, 1)


def test_a_started_fusion_moves_as_much_as_one_that_is_not():
    body = (
        "%slicing (a: f32[9,4,8], i: s32[]) -> f32[1,4,8] {\n"
        "  %a = f32[9,4,8]{2,1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  ROOT %one = f32[1,4,8]{2,1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,4,8}\n"
        "}\n"
    )
    program = read(
        "  %all = f32[9,4,8]{2,1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  %start = ((f32[9,4,8]{2,1,0}, s32[]), f32[1,4,8]{2,1,0}, u32[]) fusion-start(%all, %i), kind=kLoop, "
        "calls=%slicing\n"
        "  ROOT %done = f32[1,4,8]{2,1,0} fusion-done(%start)",
        body,
    )
    # It reads and writes the slice; the number of the slice has 4 bytes.
    assert total(program.operations, "bytes") == 2 * 4 * 8 * 4 + 4


def test_kernels_are_named_with_their_arrays_and_what_they_say_of_themselves():
    entry = """  %q = bf16[2,4,16,8]{3,2,1,0} parameter(0)
  %k = bf16[2,4,32,8]{3,2,1,0} parameter(1)
  %mask = s8[1,2,2]{2,1,0} parameter(2)
  %splash_mha_fwd.3.clone = bf16[2,4,16,8]{3,2,1,0} custom-call(%mask, %q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUg=="}}
  %twice.1 = bf16[2,4,16,8]{3,2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"123","transcendentals":"3"}}}
  ROOT %y = bf16[2,4,16,8]{3,2,1,0} custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward\""""  # noqa: E501
    program = read(entry)
    splash, twice, cudnn = program.kernels
    assert [k.name for k in program.kernels] == ["splash_mha_fwd", "twice", "__cudnn$fmhaSoftmaxBackward"]
    assert splash.operands[1] == Array("bf16", (2, 4, 16, 8))
    assert splash.attention_flops == 2 * 2 * (2 * 4 * 16 * 8) * 32
    assert (twice.estimate, splash.estimate, twice.attention_flops) == (123, None, 0)
    assert cudnn.attention_flops == 5 * 2 * (2 * 4 * 16 * 8) * 4
    assert total(program.operations, "flops") == 0


def test_attention_is_counted_over_the_pairs_that_its_name_states():
    entry = """  %q = bf16[4,16,8]{2,1,0} parameter(0)
  %k = bf16[4,32,8]{2,1,0} parameter(1)
  %splash_mha_dq.1 = bf16[4,16,8]{2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", metadata={op_name="attention_pairs_300/pallas_call"}
  %a = bf16[2,32,4,8]{3,2,1,0} parameter(2)
  %fmha.1 = bf16[2,32,4,8]{3,2,1,0} custom-call(%a, %a), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="attention_pairs_528/fwd"}
  ROOT %fmha.2 = bf16[2,32,4,8]{3,2,1,0} custom-call(%a, %a), custom_call_target="__cudnn$fmhaSoftmax\""""  # noqa: E501
    splash, causal, whole = read(entry).kernels
    assert splash.attention_flops == 3 * 2 * 4 * 8 * 300
    assert causal.attention_flops == 2 * 2 * 2 * 4 * 8 * 528
    assert whole.attention_flops == 2 * 2 * 2 * 4 * 8 * 32 * 32


def test_an_estimate_that_cannot_be_is_left_out_and_said():
    program = read(
        "  %p = f32[250]{0} parameter(0)\n"
        f'  ROOT %f = f32[250]{{0}} negate(%p), backend_config={{"estimated_cycles":"{2**62}"}}'
    )
    assert total(program.operations, "cycles") == 0
    assert "is ignored" in program.notes[0]
    assert simulated(program).total == pytest.approx(2000 / 1e9)


def test_a_plain_sum_takes_the_time_of_its_memory_and_not_the_compilers_cycles():
    program = read(
        "  %p = f32[4,250]{1,0} parameter(0)\n  %zero = f32[] constant(0)\n"
        '  ROOT %sum = f32[250]{0} reduce(%p, %zero), dimensions={0}, backend_config={"estimated_cycles":"1000000"}'
    )
    assert total(program.operations, "cycles") == 0
    assert simulated(program).total == pytest.approx(5004 / 1e9)


def test_the_arrays_of_a_program_are_those_that_lie_in_memory():
    fused = """%fused (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %large = f32[4,1000]{1,0} broadcast(%a), dimensions={0}
  ROOT %r = f32[4]{0} reduce(%large, %a), dimensions={1}, to_apply=%add
}
"""
    program = read("  %p = f32[4]{0} parameter(0)\n  ROOT %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused", fused)
    assert program.arrays == {Array("f32", (4,))}
    assert [Array(dtype, (3,)).bytes for dtype in ("pred", "s4", "f8e4m3fn", "bf16", "f32", "token")] == [
        3,
        2,
        3,
        6,
        12,
        0,
    ]


# --- Programs that are compiled ---


def scanned(mesh: Mesh, dtype: str):
    """L layers of x ← relu(x W) V with weights in shards of `fsdp`, M parts of a batch each, and their gradients.

    With the gathers and sums as a training step has them: weights gathered in each layer, recomputed in the backward
    pass, gradients scattered, and the loss summed over all.
    """

    def layer(x, w, v):
        w, v = (jax.lax.all_gather(y, "fsdp", axis=0, tiled=True) for y in (w, v))
        return jax.nn.relu(x @ w) @ v

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, of: (jax.checkpoint(layer)(x, *of), None), x, weights)
        return jnp.sum(x * x)

    def step(weights, x_MBD):
        def part(total, x):
            gradients = jax.grad(loss)(weights, x)
            return jax.tree.map(jnp.add, total, gradients), None

        total, _ = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, weights), x_MBD)
        total = jax.lax.psum(total, "data")
        return jax.lax.ppermute(total, "data", [(0, 1), (1, 0)])

    specs = ((P(None, "fsdp", None), P(None, "fsdp", None)), P(None, ("data", "fsdp"), None))
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)

    def of(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = (of((L, D, F), specs[0][0]), of((L, F, D), specs[0][1]))
    return jax.jit(step, donate_argnums=0), (weights, of((M, 64, D), specs[1]))


def counted_by_hand(program: Program, dtype: str) -> None:
    """A mesh of data 2 × fsdp 4: each device has 8 rows of each of M parts."""
    rows, weights = 64 // 8, 2 * D * F
    # Forward and backward 2 + 4 a weight and row; the first product of each layer once more.
    assert total(program.operations, "flops") == M * L * rows * (6 * weights + 2 * D * F)
    size = L * weights * jnp.dtype(dtype).itemsize
    assert payloads(program) == {
        ("all-gather", ("fsdp",), SHORT[dtype]): 2 * M * size,
        ("reduce-scatter", ("fsdp",), SHORT[dtype]): M * size,
        ("all-reduce", ("data",), SHORT[dtype]): size // 4,
        ("permute", ("data",), SHORT[dtype]): size // 4,
    }
    # The weights of all layers that a device has, and their sums, but nothing larger.
    assert max(array.elements for array in program.arrays) <= L * weights // 4
    assert program.aliases == 2
    assert program.notes == ()


def mesh_of(devices) -> Mesh:
    return Mesh(np.array(devices[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_a_step_on_cpu_is_as_counted_by_hand():
    mesh = mesh_of(jax.devices())
    function, arguments = scanned(mesh, "float32")
    program = read_program(function.lower(*arguments).compile().as_text(), mesh.shape)
    counted_by_hand(program, "float32")
    told = simulated(program)
    assert told.compute >= total(program.operations, "flops") / CHIP.peak_flops
    assert sum(told.waiting.values()) == pytest.approx(sum(told.communication.values()))
    assert told.total == pytest.approx(told.compute + sum(told.waiting.values()))


@pytest.mark.parametrize(("compiler", "topology"), [("libtpu", "v5e:2x4"), ("jax_cuda13_plugin", "h100:1x8")])
def test_a_step_on_other_chips_is_as_counted_by_hand(compiler: str, topology: str):
    require(compiler)
    mesh = mesh_of(topology_devices(topology))
    function, arguments = scanned(mesh, "bfloat16")
    with without_jax_cache():
        program = read_program(function.lower(*arguments).compile().as_text(), mesh.shape)
    counted_by_hand(program, "bfloat16")
    assert any(asynchronous(program))
    assert (total(program.operations, "cycles") > 0) == (compiler == "libtpu")
    told = simulated(program)
    assert told.compute >= total(program.operations, "cycles") / CHIP.cycles_per_second
    assert told.total == pytest.approx(told.compute + sum(told.waiting.values()) + told.memory)
    assert 0 < sum(told.waiting.values()) < sum(told.communication.values())
