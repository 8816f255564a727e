"""The training step as the compilers leave it: what it sends, holds and calls, against counts by formula."""

import functools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.kernels import visited_pairs
from model.parameters import padded_vocabulary, parameter_table
from tests.peers import require
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import make_mesh
from train.planning.compilation import Compilation, compile_step
from train.planning.operations import Program, total, walked
from train.planning.plan import argument_bytes
from train.planning.reader import read_program
from train.planning.topology import topology_devices, without_jax_cache
from train.step.flops import flops_per_token
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state

# An array that is a multiple of 7 holds all layers, of 3 and 11 the logits of all positions. Sums that are smaller the
# TPU compiler does not scatter.
L, D, H, C, F, V = 7, 128, 4, 128, 512, 11 * 128
ROWS, T, CHUNK = 3, 128, 96  # of a device: rows, positions of each, and those whose logits exist at once
BF16, FLOAT = 2, 4  # bytes
LAYER = (4 * D * H * C + 3 * D * F) * BF16  # weights of a layer, as they are gathered
TABLE = D * V * BF16  # the embedding, and the unembedding
COMPILERS = {"v": "libtpu", "h": "jax_cuda13_plugin"}
FULL_GATHER = "Involuntary full rematerialization"


class Case(NamedTuple):
    """What a step is compiled for: a topology, and the mesh axes on which its devices are not those of fsdp."""

    topology: str
    axis: str = ""
    layers: int = L
    parts: int = 1
    rows: int = ROWS
    remat: str = "full"
    matmul: str | None = None

    def __str__(self) -> str:
        more = (f"{self.layers} layers" * (self.layers != L), f"{self.parts} parts" * (self.parts > 1))
        more += (f"{self.rows} row" * (self.rows == 1), f"{self.remat} kept" * (self.remat != "full"))
        return " ".join(filter(None, (self.topology, self.axis, *more, self.matmul)))


class Step(NamedTuple):
    """A compiled step, and what the compiler said meanwhile."""

    config: Config
    mesh: Mesh
    compilation: Compilation
    program: Program
    said: str

    @property
    def size(self) -> Mapping[str, int]:
        return self.mesh.shape


TPU, V5P, GPU = "v5e:2x2", "v5p:2x2x1", "h100:1x4"
# Four TPUs on fsdp alone are a slice of "slice"; a batch in parts, many layers and products of 8 bits have a mesh each,
# not programs more. So does attention that is kept, of a single row and with float8.
IN_PARTS, DEEP, INT8 = Case(TPU, "data", parts=2), Case(GPU, layers=14 * L), Case(TPU, "slice", matmul="int8")
MESHES = [Case(V5P, "tensor"), Case(TPU, "context"), IN_PARTS, INT8]
MESHES += [DEEP, Case(GPU, "tensor"), Case(GPU, "context")]
SINGLE_ROW, FLOAT8 = Case(TPU, "tensor", rows=1, remat="attention"), Case(GPU, matmul="float8", remat="attention")
over_meshes = pytest.mark.parametrize("case", MESHES, ids=str)


@contextmanager
def what_compilers_say() -> Iterator[list[str]]:
    """What is written to the standard error itself, by code that is not Python."""
    said: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            os.write(2, said[0].encode())


@functools.cache
def step_of(case: Case) -> Step:
    require(COMPILERS[case.topology[0]])
    on_axis = {case.axis: 2} if case.axis not in ("", "slice") else {}
    slices = 2 if case.axis == "slice" else 1
    devices = topology_devices(case.topology, slices)
    shares_row = on_axis.get("context", 1) * on_axis.get("tensor", 1)
    values: dict[str, Any] = {
        "model": {
            "num_layers": case.layers, "model_dim": D, "num_heads": H, "head_dim": C, "feedforward_dim": F,
            "vocab_size": V - 8, "loss_chunk": CHUNK, "remat_policy": case.remat,
            "matmul_dtype": case.matmul,
        },
        "data": {"segment_length": T * on_axis.get("context", 1)},
        "mesh": on_axis,
        "train": {
            "batch_size": case.parts * case.rows * len(devices) // shares_row, "accumulation_steps": case.parts
        },
    }  # fmt: skip
    config = make_config(values).resolved()
    assert padded_vocabulary(config.model) == V
    mesh = make_mesh(config, devices)
    with what_compilers_say() as said:
        compilation = compile_step(config, mesh)
    return Step(config, mesh, compilation, read_program(compilation.text, mesh.shape), said[0])


# --- What is sent ---


def stream(size: Mapping[str, int]) -> int:
    """Bytes of the residual stream [B, T, D] on a device."""
    return ROWS * T * D * BF16 // size["tensor"]


def expected_traffic(size: Mapping[str, int], L: int, parts: int) -> Counter[tuple[str, str]]:
    """Bytes a step by kind and mesh axis, all in bfloat16: the formula that the sharding was designed to.

    Layers are gathered for each of the two passes, their gradients are summed once; for each part of a batch again, but
    for the sums over copies, which follow the last part.
    """
    sent: Counter[tuple[str, str]] = Counter()
    fsdp, context, tensor = size["fsdp"], size["context"], size["tensor"]
    layers, matrix = L * LAYER // tensor, TABLE // tensor
    x = stream(size)
    # Of what context and fsdp store, context's share moves first and is summed last; copies then sum what is left.
    for axis, shards in (("fsdp", 1), ("context", fsdp)):
        sent["all-gather", axis] += (2 * layers + matrix) // shards
        sent["reduce-scatter", axis] += (layers + matrix) // shards
    # Each device looks up a part of D for all and gets all of D for its own positions; backward the other way round.
    for axis in ("fsdp", "context", "tensor"):
        sent["all-to-all", axis] += 2 * x
    sent["all-to-all", "tensor"] += 2 * TABLE // (fsdp * tensor)
    # Attention over shared positions: keys and values of all, gathered, gathered again by remat, and their gradients.
    keys_and_values = 2 * ROWS * context * T * H * C // tensor * BF16
    sent["all-gather", "context"] += 2 * L * keys_and_values
    sent["reduce-scatter", "context"] += L * keys_and_values
    # Attention and feed-forward each gather the positions and scatter sums; so do their gradients, and remat, which
    # needs all but the last scatter. The loss does it once.
    sent["all-gather", "tensor"] += (2 + 2 + 2) * L * x * tensor + x * tensor
    sent["reduce-scatter", "tensor"] += (2 + 1 + 2) * L * x * tensor + x * tensor
    traffic = Counter({key: parts * number for key, number in sent.items()})
    for axis in ("data", "slice"):
        traffic["all-reduce", axis] += (layers + matrix + TABLE) // (fsdp * context)
    return Counter({key: number for key, number in traffic.items() if size[key[1]] > 1})


@pytest.mark.parametrize("case", [*MESHES, FLOAT8], ids=str)
def test_a_step_sends_what_the_formula_says_and_nothing_else(case: Case):
    step = step_of(case)
    found: Counter[tuple[str, tuple[str, ...], str]] = Counter()
    for c in step.program.collectives:
        found[c.kind, c.axes, c.dtype] += c.payload_bytes * c.count
    expected = expected_traffic(step.size, case.layers, case.parts)
    wanted = {(kind, (axis,), "bf16"): number for (kind, axis), number in expected.items()}
    # Ids, norms, the softmax's and the metrics' sums; together less than half a device's residual stream, or of many
    # layers little more than the gradients of their two norms.
    most = max(stream(step.size) // 2, int(1.1 * 2 * D * FLOAT * case.layers))
    beside = {key: found[key] - wanted.get(key, 0) for key in {*found, *wanted}}
    assert {key: number for key, number in beside.items() if not 0 <= number < most} == {}


@over_meshes
def test_small_sums_are_few(case: Case):
    step = step_of(case)
    small = [c for c in step.program.collectives if c.payload_bytes < stream(step.size) // 4]
    # A few a chunk of the loss where the vocabulary is shared; the ids' own gather in each layer's remat where
    # positions are. Of many layers, norms' gradients are summed one by one.
    chunks = 6 * (ROWS * T // CHUNK) if case.axis == "tensor" else 0
    layers = case.layers if case.axis == "context" or case is DEEP else 0
    assert sum(c.count for c in small) <= 8 + chunks + layers, [
        (c.kind, c.axes, c.dtype, c.payload_bytes) for c in small
    ]


def test_the_residuals_of_a_single_row_are_scattered_too():
    step = step_of(SINGLE_ROW)
    whole = [c for c in step.program.collectives if c.kind == "all-reduce" and "tensor" in c.axes]
    assert max(c.payload_bytes for c in whole) < T * D * BF16 // 4


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its partitioner would gather what a layout is asked of")
def test_what_is_kept_of_a_single_row_is_in_the_order_of_its_axes():
    text = step_of(Case(TPU, rows=1, remat="products")).compilation.text
    kept = [order for order in ("3,2,1,0", "2,3,1,0") if f"bf16[{L},1,{T},{D}]{{{order}:" in text]
    assert kept == ["3,2,1,0"]


def test_gradients_are_summed_for_each_part_of_a_batch():
    def summed(case: Case) -> int:
        of = [c for c in step_of(case).program.collectives if c.kind == "reduce-scatter"]
        return sum(c.payload_bytes * c.count for c in of)

    assert summed(IN_PARTS) == IN_PARTS.parts * summed(INT8) == IN_PARTS.parts * (L * LAYER + TABLE)


@pytest.mark.parametrize(
    ("case", "kind", "axis", "least"),
    [
        (IN_PARTS, "all-gather", "fsdp", 0.75),
        (INT8, "all-reduce", "slice", 0.99),
        (Case(V5P, "tensor"), "all-gather", "fsdp", 0.99),
        (Case(V5P, "tensor"), "all-gather", "tensor", 0.99),
        (Case(V5P, "tensor"), "reduce-scatter", "tensor", 0.99),
        (DEEP, "all-gather", "fsdp", 0.9),
        (DEEP, "reduce-scatter", "fsdp", 0.9),
    ],
    ids=str,
)
def test_what_is_sent_is_hidden_by_what_is_computed_meanwhile(case: Case, kind: str, axis: str, least: float):
    sent: Counter[bool] = Counter()
    for operation, times in walked(step_of(case).program.operations):
        collective = operation.collective
        if collective and (collective.kind, collective.axes) == (kind, (axis,)):
            sent[operation.asynchronous] += times * collective.payload_bytes
    assert sent[True] / sent.total() >= least


@pytest.mark.parametrize("case", [case for case in MESHES if case.topology == GPU], ids=str)
def test_the_partitioner_never_says_that_it_must_gather_an_array_whole(case: Case):
    assert FULL_GATHER not in step_of(case).said


def test_if_it_did_that_would_be_seen():
    # The TPU compiler says nothing; its partitioner is the same.
    require(COMPILERS["h"])
    mesh = Mesh(np.array(topology_devices("h100:1x8")).reshape(2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def moved(x: jax.Array) -> jax.Array:
        return jnp.sin(jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, PartitionSpec(None, "x"))))

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("x", "y"))))
    with what_compilers_say() as said, without_jax_cache():
        jax.jit(moved).lower(x).compile()
    assert FULL_GATHER in said[0]


# --- What is held ---


@over_meshes
def test_the_state_is_in_equal_shards(case: Case):
    step = step_of(case)
    shards = math.prod(step.size[axis] for axis in ("fsdp", "context", "tensor"))
    parameters = sum(math.prod(p.shape) for p in parameter_table(step.config.model).values())
    of_state = step.compilation.memory["argument"] - argument_bytes(step.config, step.mesh)["batch"]
    # Weights and AdamW's two moments; norms are whole everywhere.
    assert 1 <= of_state / (3 * parameters * FLOAT / shards) < 1.02


@over_meshes
def test_the_new_state_takes_the_memory_of_the_old(case: Case):
    step = step_of(case)
    with jax.set_mesh(step.mesh):
        arrays = len(jax.tree.leaves(abstract_state(step.config, make_optimizer(step.config))))
    memory, batch = step.compilation.memory, argument_bytes(step.config, step.mesh)["batch"]
    aliases = step.program.aliases
    assert aliases == arrays
    # A TPU has three rows as four.
    assert batch <= memory["argument"] - memory["alias"] <= batch * 4 / 3


@over_meshes
def test_the_logits_of_a_batch_are_never_there(case: Case):
    step = step_of(case)
    vocabulary = V // step.size["tensor"]
    assert [
        a for a in step.program.arrays if a.elements >= ROWS * T * vocabulary and a.elements % (ROWS * vocabulary) == 0
    ] == []


@over_meshes
def test_the_weights_of_all_layers_are_never_whole(case: Case):
    step = step_of(case)
    smallest = case.layers * D * min(H * C, F) // step.size["tensor"]
    assert [a for a in step.program.arrays if a.elements >= smallest and a.elements % L == 0] == []


# --- What is called ---


def attention_kernels(program: Program) -> Counter[str]:
    """How often each kernel of attention runs, by name."""
    times: Counter[str] = Counter()
    for kernel, count in program.kernels.items():
        if kernel.attention_flops:
            times[kernel.name] += count
    return times


@over_meshes
def test_attention_is_done_by_kernels(case: Case):
    times = attention_kernels(step_of(case).program)
    each = case.layers * case.parts
    # One kernel gives the gradients of queries, keys and values.
    on_tpu = {"splash_mha_fwd_segmented_residuals": 2, "splash_mha_dkv_segmented_no_residuals": 1}
    on_gpu = {"__cudnn$fmhaScaleBiasSoftmax": 2, "__cudnn$fmhaScaleBiasSoftmaxBackward": 1}
    # Forward twice, because of remat. cuDNN computes the earlier half of shared positions apart.
    calls = each * (2 if case == Case(GPU, "context") else 1)
    assert times == {name: calls * n for name, n in (on_gpu if case.topology == GPU else on_tpu).items()}


@pytest.mark.parametrize("case", [SINGLE_ROW, FLOAT8], ids=str)
def test_kept_attention_is_not_done_again(case: Case):
    times = attention_kernels(step_of(case).program)
    assert set(times.values()) == {L}


def test_a_ring_sends_keys_around_and_gathers_none_and_the_plan_counts_its_pairs():
    require(COMPILERS["v"])
    layers, n, length = 2, 4, 1024
    fields = {"num_layers": layers, "model_dim": D, "num_heads": H, "num_kv_heads": H // 2, "head_dim": C}
    fields |= {"feedforward_dim": F, "vocab_size": V, "remat_policy": "full", "context_attention": "ring"}
    values = {"model": fields, "data": {"segment_length": length}, "mesh": {"context": n}, "train": {"batch_size": 1}}
    config = make_config(values).resolved()
    mesh = make_mesh(config, topology_devices(TPU))
    program = read_program(compile_step(config, mesh).text, dict(mesh.shape))
    sent: Counter[tuple[str, str]] = Counter()
    for c in program.collectives:
        sent[c.kind, c.dtype] += c.payload_bytes * c.count
    keys = 2 * (length // n) * (H // 2) * C  # numbers in the keys and values of a device
    # Forward, in the layer's repetition and backward they go around; the two passes share what is sent first.
    assert sent["permute", "bf16"] == layers * (3 * n - 1) * keys * BF16
    assert sent["permute", "f32"] == layers * n * keys * FLOAT
    weights = 2 * layers * (2 * D * H * C + 2 * D * (H // 2) * C + 3 * D * F) * BF16 + TABLE
    assert 0 <= sent["all-gather", "bf16"] - weights < keys * BF16
    # Two products forward, twice, and five backward.
    pairs = visited_pairs("splash", length, None, n, True)
    assert sum(kernel.flops * times for kernel, times in program.kernels.items()) == 9 * 2 * H * C * pairs * layers


@pytest.mark.parametrize("case", [FLOAT8, INT8], ids=str)
def test_products_with_weights_have_8_bits_but_for_the_gradients_of_weights(case: Case):
    program = step_of(case).program
    of_one = 2 * ROWS * T * D * F
    assert H * C == F
    # A layer has seven matrices; remat repeats all products but the last.
    assert total(program.operations, "eight_bit_flops") == L * (7 + 6 + 7) * of_one
    others = L * 7 * of_one + 3 * 2 * ROWS * T * D * V
    flops = total(program.operations, "flops") - total(program.operations, "eight_bit_flops")
    # A TPU rotates queries and keys by a product: forward, once more, and backward.
    rotations = 3 * 2 * L * 2 * ROWS * T * H * C * C if case.topology == TPU else 0
    assert flops == others + rotations
    # The operands as the multipliers take them; whatever widened them first would not count.
    dtypes = {array.dtype for array in program.arrays}
    assert dtypes >= ({"f8e4m3fn"} if case.matmul == "float8" else {"s8"})


def test_a_program_is_as_large_for_98_layers_as_for_7():
    # A mesh that shares positions needs some instructions more; a layer twice would be hundreds.
    few, many = step_of(Case(GPU, "context")), step_of(DEEP)
    assert many.program.instructions <= few.program.instructions
    assert len(many.compilation.text) <= len(few.compilation.text)


def test_a_mixture_multiplies_the_chosen_experts_alone_and_the_plan_counts_them():
    """XLA's own grouped product multiplies all rows by all experts on a GPU."""
    require(COMPILERS["h"])
    experts, chosen, width = 8, 2, 256
    fields = {"num_layers": L, "model_dim": D, "num_heads": H, "head_dim": C, "feedforward_dim": F, "vocab_size": V}
    model = fields | {"num_experts": experts, "experts_per_token": chosen, "expert_dim": width}
    config = make_config({"model": model, "data": {"segment_length": T}, "train": {"batch_size": 4 * ROWS}}).resolved()
    mesh = make_mesh(config, topology_devices(GPU))
    program = read_program(compile_step(config, mesh).text, dict(mesh.shape))
    kernels = {kernel: times for kernel, times in program.kernels.items() if kernel.is_grouped}
    # Forward and backward are three products of each matrix.
    a_row = sum(kernel.flops_of_row * times for kernel, times in kernels.items())
    assert a_row == 3 * 2 * (3 * D * width) * L
    grouped = ROWS * T * chosen * a_row
    # The plan counts half a tile of each expert more.
    assert sum(kernel.flops * times for kernel, times in kernels.items()) == grouped + experts * 64 * a_row
    others = 6 * ROWS * T * (L * 4 * D * H * C + D * V + L * D * experts)
    assert total(program.operations, "flops") == others
    # The model's formula has the same, and attention, which is a kernel of its own.
    attention = 12 * H * C * (T / 2) * L
    assert grouped + others == pytest.approx((flops_per_token(config.model, T) - attention) * ROWS * T, rel=1e-6)
    rows = ROWS * T * chosen
    assert not [x for x in program.arrays if {experts, rows} <= set(x.dims) and x.elements >= experts * rows * D]
