"""Estimates a training step from its sizes alone, to choose which of many programs are worth compiling.

It sums in a millisecond the same kinds of terms that a plan reads from a compiled program: products, kernels and
traffic as the decoder makes them, memory traffic, and peak memory. The constants that no count gives
(`MATMUL_EFFICIENCY`, `MEMORY_PASSES`, `HELD_COPIES`) are fitted to compiled programs; docs/scaling.md has the remaining
error and the command that measures it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from model.feedforward.grouped import PLATFORM_KERNELS, rows_tile, wasted_rows
from model.kernels import KernelChoice, has_one_backward_kernel, has_wide_heads, visited_pairs
from model.layers import layer_kinds
from model.parameters import Parameter, parameter_table
from model.sharding import as_tuple
from train.config.config import ResolvedConfig
from train.devices.hardware import Chip
from train.devices.rules import training_layout
from train.devices.xla import sparse_cores_send
from train.planning.speed import Bandwidth, attention_seconds, reached

# Share of peak FLOP/s that large matmuls reach on a TPU, by the compiler's cycles.
MATMUL_EFFICIENCY = {"v4": 0.8, "v5e": 0.85, "v5p": 0.8, "v6e": 0.73, "tpu7x": 0.8}
# What is left of that where devices share the positions or the heads of a row; fitted.
SHARED_ROW = 0.93
# How often a layer reads or writes (the residual stream, the outputs of its matmuls) outside the matmuls, and each part
# of a batch but one the shards of all weights: it rounds them and adds up their gradients. Fitted.
MEMORY_PASSES = (28.0, 4.4, 20.0)
# Copies of (a layer's residual stream, its weights) that its backward pass holds at once; fitted.
HELD_COPIES = (6.0, 4.0)
# Number of products over the visited pairs of positions in attention: (forward, backward).
ATTENTION_PRODUCTS = {"splash": (2, 5), "cudnn": (2, 5), "plain": (2, 4)}
# Those of splash attention's two backward kernels, where one does not give all gradients.
IN_TWO_KERNELS = (3, 4)
# Share of what SparseCores send that computation waits for even so: compiled programs have 1 to 10%, or more of little.
EXPOSED = 0.1
BF16, F32 = 2, 4
# Axes by which weights are only stored.
STORED = ("model", "latent", "expert_model")


class Estimate(NamedTuple):
    """Estimated figures of one device; weights and optimizer state are `state_bytes` of its `peak_bytes`.

    Communication is what nothing hides, one after the other; transfers are the copies to the host's memory and back.
    """

    peak_bytes: float
    state_bytes: float
    compute_seconds: float
    communication_seconds: float
    transfer_seconds: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, with copies to the host hidden."""
        return max(self.compute_seconds + self.communication_seconds, self.transfer_seconds)


# Arrays that each remat policy keeps for the backward pass, in the device's memory and in the host's. The backward pass
# repeats the products of a layer (but the last) and the attention kernel if their outputs are in neither; projections
# are the products of the attention floor.
KEPT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": (("residual", "attention", "projections", "feedforward", "weights"), ()),
    "products": (("residual", "attention", "projections", "feedforward"), ()),
    "projections": (("residual", "attention", "projections"), ()),
    "attention": (("residual", "attention"), ()),
    "full": (("residual",), ()),
    "offload_products": (("residual",), ("attention", "projections", "feedforward")),
    "offload": ((), ("residual",)),
}


class Machine(NamedTuple):
    """Devices in a mesh, and figures that are the same for all steps on it."""

    shape: Mapping[str, int]  # size by mesh axis
    chip: Chip
    bandwidth: Bandwidth
    attention: KernelChoice
    state: float  # bytes of a step's state for each byte of the weights


def estimate(config: ResolvedConfig, machine: Machine) -> Estimate:
    """Estimates the step of a resolved config on a mesh on which it is legal."""
    step = _Step(config, machine)
    transfers = 2 * step.parts * step.bytes_of(step.offloaded) / machine.chip.host_bandwidth
    compute, communication, last = step.compute_seconds(), step.communication_seconds(), step.copies_seconds()
    if sparse_cores_send(machine.chip):
        communication = max(EXPOSED * communication, communication - compute)
        # Sums of one part run during its backward pass; those of several follow the last.
        last *= EXPOSED if step.parts == 1 else 1
    return Estimate(step.peak_bytes(), step.state_bytes, compute, communication + last, transfers)


class _Matrix(NamedTuple):
    """A matrix of the stack.

    Attributes:
        part: the part of a block that has it.
        layers: the layers that have it.
        elements: those of a layer that one device multiplies with.
        worked: multiplications for a token.
        inputs: the number of terms in a sum.
        is_last: True if its result is added to the residual stream.
    """

    part: str
    layers: int
    elements: float
    worked: float
    inputs: int
    is_last: bool
    has_experts: bool

    @property
    def kept_as(self) -> str:
        """The array of `KEPT` that has its result."""
        return "projections" if self.part == "attention" else "feedforward"


class _Step:
    def __init__(self, config: ResolvedConfig, machine: Machine):
        self.config = config
        self.machine = machine
        self.chip = machine.chip
        self.model = config.model
        self.layout = training_layout(config.mesh)
        self.kept, self.offloaded = KEPT[config.model.remat_policy]
        self.has = {*self.kept, *self.offloaded}
        self.parts = config.train.accumulation_steps
        T = config.data.segment_length
        D = config.model.model_dim
        # Rows of a part on one device, and its positions inside the floors and between them.
        self.rows = config.train.batch_size / self.parts / self.size("batch")
        self.inside = self.rows * T / self.size("time")
        self.between = self.rows * T / self.size("sequence")
        table = parameter_table(config.model)
        # Elements of the residual stream inside a floor.
        self.stream = self.inside * D
        self.matrices = [self.matrix(name, p) for name, p in table.items() if p.role == "matrix"]
        # Means over layers: elements of gathered matrices on a device, by which axis stores them, and multiplications
        # for a token; and elements of the outputs of products inside the floors.
        L = self.model.num_layers
        of_experts = sum(m.layers * m.elements for m in self.matrices if m.has_experts) / L
        self.layer = sum(m.layers * m.elements for m in self.matrices) / L
        self.stored = {"expert_model": of_experts, "model": self.layer - of_experts}
        self.worked = sum(m.layers * m.worked for m in self.matrices) / L
        self.results = dict.fromkeys(("projections", "feedforward"), 0.0)
        for m in self.matrices:
            self.results[m.kept_as] += self.inside * m.layers * m.worked / m.inputs / L * (not m.is_last)
        self.wasted = self.wasted_share()
        # Of the layer that has the most.
        alone = lambda kind: sum(m.elements for m in self.matrices if kind.has(m.part))
        self.largest = max(map(alone, layer_kinds(self.model)))
        # Rows of tokens on their way to experts, in streams.
        self.copies = 2 * self.model.experts_per_token if self.model.num_experts else 0
        self.weight_bytes = F32 * sum(math.prod(p.shape) / self.size(*p.axes) for p in table.values())
        self.state_bytes = self.weight_bytes * machine.state
        vocabulary = math.prod(table["embedding.table"].shape) / self.size("vocabulary")
        self.head = 0.0 if config.model.reward_head else vocabulary
        self.heads = self.model.num_heads * self.model.head_dim / self.size("heads")
        self.keys = self.model.num_kv_heads * self.model.head_dim / self.size("kv_heads")

    def matrix(self, name: str, p: Parameter) -> "_Matrix":
        """Returns what a step does with a parameter."""
        elements = math.prod(p.shape[1:]) / self.size(*(axis for axis in p.axes if axis not in STORED))
        has_experts = "experts" in p.axes
        share = 1.0
        if has_experts:
            share = self.model.experts_per_token * self.size("experts") / p.axes["experts"]
        inputs = math.prod(p.axes[axis] for axis in p.fan_in)
        _, part, *rest = name.split(".")
        is_last = rest[-1] in ("output", "down")
        return _Matrix(part, p.shape[0], elements, share * elements, inputs, is_last, has_experts)

    def wasted_share(self) -> float:
        """Returns the multiplications of experts' tiles that belong to other rows, as a share of all."""
        if not self.model.num_experts:
            return 0.0
        experts = self.model.num_experts // self.size("experts")
        rows = round(self.inside * self.model.experts_per_token)
        worked = sum(m.layers * m.worked for m in self.matrices if m.has_experts) / self.model.num_layers
        wasted = wasted_rows(PLATFORM_KERNELS[self.chip.platform], experts, rows_tile(rows, experts))
        return worked / self.worked * wasted / rows

    def size(self, *axes: str) -> int:
        """Returns the number of devices that share any of these logical axes."""
        return math.prod(self.machine.shape[name] for name in self.layout.mesh_axes(*axes))

    def compute_seconds(self) -> float:
        """Seconds of products, the attention kernel and other memory traffic."""
        L = self.model.num_layers
        chip = self.chip
        # The last product of a layer is not needed again.
        is_repeated = lambda m: m.kept_as not in self.has and (m.kept_as == "projections" or not m.is_last)
        repeated = sum(m.layers * m.worked for m in self.matrices if is_repeated(m)) / L
        products = 2 * self.inside * (L * (3 * self.worked + repeated) * (1 + self.wasted) + 3 * self.head)
        streams = (MEMORY_PASSES[0] + 4 * self.copies) * self.stream
        moved = L * BF16 * (streams + MEMORY_PASSES[1] * sum(self.results.values()))
        # The gradients of weights and the unembedding stay in the compute dtype.
        eight_bit = 2 * self.inside * L * (2 * self.worked + repeated) if self.model.matmul_dtype else 0.0
        share = MATMUL_EFFICIENCY.get(chip.name, reached(chip).products)
        share *= SHARED_ROW if self.size("time", "heads") > 1 else 1
        bandwidth = chip.memory_bandwidth * reached(chip).memory
        part_seconds = chip.product_seconds(products, eight_bit) / share + self.attention_seconds() + moved / bandwidth
        for_parts = MEMORY_PASSES[2] * (self.parts - 1) * self.weight_bytes
        return self.parts * part_seconds + (for_parts + 2.5 * self.state_bytes) / bandwidth

    def attention_seconds(self) -> float:
        """Seconds of the attention kernels of all layers, for a part of the batch."""
        T, shards = self.config.data.segment_length, self.size("time")
        kernel, _, is_ring, _ = self.machine.attention
        forward, backward = ATTENTION_PRODUCTS[kernel]
        forward_runs = 1 if "attention" in self.has else 2
        is_wide = has_wide_heads(self.model)
        total = 0.0
        for kind in layer_kinds(self.model):
            # The kernels of a ring see the positions of a device.
            seen = (T // shards, kind.window, 1) if is_ring else (T, kind.window, shards)
            in_two = kernel == "splash" and not has_one_backward_kernel(*seen, is_wide)
            terms = self.rows * visited_pairs(kernel, T, kind.window, shards, is_ring, is_wide) * self.heads
            seconds = lambda products, terms=terms: attention_seconds(
                products > forward, 2 * products * terms, terms / self.model.head_dim, self.chip
            )
            total += forward_runs * seconds(forward)
            total += sum(map(seconds, IN_TWO_KERNELS if in_two else (backward,)))
        return total

    def communication_seconds(self) -> float:
        """Seconds of communication for weights, shards of gradients, residuals, keys and look-ups."""
        L = self.model.num_layers
        parts = self.parts
        repeats = "weights" not in self.kept
        gathered = sum(self.weights(count, 1 + repeats, axis) for axis, count in self.stored.items())
        seconds = parts * (L * gathered + self.weights(self.head, 1, "model"))
        stream = self.stream * BF16
        # Tokens travel to experts and their sums back, and so do the gradients.
        with_experts = sum(kind.experts for kind in layer_kinds(self.model))
        travel = self.sent("gather", stream * self.size("experts"), self.layout.mesh_axes("experts"))
        seconds += parts * with_experts * (4 + repeats) * travel
        over = self.layout.mesh_axes("sequence") - self.layout.mesh_axes("time")
        # A layer's residuals move 8 times, and the backward pass repeats two or three of these transfers.
        transfers = 8 + 2 * repeats + ("projections" not in self.has)
        seconds += parts * L * transfers * self.sent("gather", stream, over)
        # The unembedding all-gathers the positions and reduces their gradients.
        seconds += parts * 2 * self.sent("gather", stream, over)
        return seconds + parts * self.keys_seconds()

    def keys_seconds(self) -> float:
        """Seconds to send all layers' keys and values forward and backward, of a ring those that kernels don't hide."""
        over = self.layout.mesh_axes("time")
        keys = self.model.num_layers * self.rows * self.config.data.segment_length * 2 * self.keys * BF16
        if not self.machine.attention.is_ring:
            return (2 + ("weights" not in self.kept)) * self.sent("gather", keys, over)
        # Each device's keys go around whenever the kernel runs, and their float32 gradients once.
        rounds = 2 + ("attention" not in self.has) + F32 / BF16
        n = self.size("time")
        return max(0.0, rounds * self.sent("gather", keys * n / (n - 1), over) - self.attention_seconds())

    def weights(self, count: float, gathers: int, axis: str) -> float:
        """Seconds to all-gather `count` weights and scatter their gradients' sums, one mesh axis after the other."""
        stored = as_tuple(self.layout.rules.get(axis))
        seconds = 0.0
        left = count * BF16
        for i, name in enumerate(stored):
            whole = frozenset(stored) >= frozenset(n for n, size in self.machine.shape.items() if size > 1) and i == 0
            kind = "sum" if whole and self.chip.platform == "tpu" else "scatter"
            seconds += gathers * self.sent("gather", left, {name}) + self.sent(kind, left, {name})
            left /= self.machine.shape[name]
        return seconds

    def copies_seconds(self) -> float:
        """Seconds to sum the gradients over copies of the weights."""
        of_layer = sum(self.sums_over_copies(count, axis) for axis, count in self.stored.items())
        return self.model.num_layers * of_layer + self.sums_over_copies(self.head, "model")

    def sums_over_copies(self, count: float, axis: str) -> float:
        """Seconds to sum the gradients of `count` weights over copies: once a step, but for experts' each part."""
        is_of_experts = axis == "expert_model"
        own = self.layout.mesh_axes("experts") if is_of_experts else frozenset()
        over = self.layout.token_axes - self.layout.mesh_axes(axis) - own
        sums = self.parts if is_of_experts else 1
        return sums * self.sent("sum", count * BF16 / self.size(axis), over)

    def sent(self, kind: str, payload: float, over: frozenset[str] | set[str]) -> float:
        """Seconds that a ring takes for a payload as `train.planning.operations` counts it."""
        axes = tuple(name for name, size in self.machine.shape.items() if name in over and size > 1)
        if not axes:
            return 0.0
        n = math.prod(self.machine.shape[name] for name in axes)
        return payload * (n - 1) / n * (2 if kind == "sum" else 1) / self.machine.bandwidth(axes)

    def bytes_of(self, names: tuple[str, ...]) -> float:
        """Bytes of arrays that the forward pass of all layers keeps for the backward pass."""
        stream = self.between * self.model.model_dim
        each = {
            "residual": stream,
            "attention": self.inside * self.heads,
            **{name: results + stream for name, results in self.results.items()},
            "weights": self.layer + 2 * self.stream + 2 * sum(self.results.values()),
        }
        return self.model.num_layers * BF16 * sum(each[name] for name in names)

    def peak_bytes(self) -> float:
        """Bytes of the state, of arrays kept for the backward pass, and of one layer or one chunk of the loss."""
        # With accumulation, those of the last part and their sum; otherwise bfloat16.
        gradients = self.weight_bytes * (1.75 if self.parts > 1 else 0.5)
        chunk = min(self.model.loss_chunk or math.inf, self.between) * self.size("vocabulary")
        loss = self.head * (BF16 + F32) + chunk * 2 * F32 * self.head / self.model.model_dim
        streams = HELD_COPIES[0] + self.copies
        layer = BF16 * (streams * self.stream + HELD_COPIES[1] * self.largest + 2 * sum(self.results.values()))
        return self.state_bytes + self.bytes_of(self.kept) + max(gradients + layer, loss)
