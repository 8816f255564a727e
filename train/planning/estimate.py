"""What a training step will take, from its sizes alone: which of many programs are worth compiling.

Sums of the same kinds that a plan reads from the compiled program, in a millisecond: products, kernels and traffic
counted as the decoder makes them, what the devices' memory moves, and what it holds at the worst moment. Three speeds
and weights that no count gives (`PRODUCTS`, `MOVED`, `HELD`) are fitted to compiled programs; docs/scaling.md has the
error that is left, and the command that measures it.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from model.parameters import parameter_table
from model.sharding import as_tuple
from train.config.config import Config
from train.devices.hardware import Chip
from train.devices.rules import training_layout

# Of the peak, large products reach on a TPU, by the compiler's cycles.
PRODUCTS = {"v4": 0.8, "v5e": 0.82, "v5p": 0.8, "v6e": 0.6}
# Times that whole positions of residuals, and the results of a layer's products, are read or written beside products.
MOVED = (60.0, 9.5)
# Copies of a layer's residuals for whole positions, and of its weights, that its backward pass holds.
HELD = (6.0, 4.0)
# Products over all pairs of positions that attention makes, forward and backward (`train.planning.operations`).
PAIRS = {"splash": (2, 7), "cudnn": (2, 5), "plain": (2, 4)}
BF16, F32 = 2, 4


class Estimate(NamedTuple):
    """Of one device.

    Attributes:
        peak_bytes: at the worst moment.
        state_bytes: of it, weights and the optimizer's.
        compute_seconds: of a step, without communication.
        communication_seconds: of all that the devices send each other, one after the other.
        transfer_seconds: of copies to the host's memory and back.
    """

    peak_bytes: float
    state_bytes: float
    compute_seconds: float
    communication_seconds: float
    transfer_seconds: float

    @property
    def step_seconds(self) -> float:
        """Copies to the host are hidden, communication is not."""
        return max(self.compute_seconds + self.communication_seconds, self.transfer_seconds)


class Recomputed(NamedTuple):
    """What the backward pass makes again under a remat policy, and what it keeps.

    Attributes:
        products: of a layer, all but the last one.
        kernel: attention's.
        sums: transfers of a layer's residuals between the devices that share its weights.
        kept: what it finds in the device's memory: "residual", "attention", "products", "weights".
        offloaded: what it finds in the host's.
    """

    products: bool
    kernel: bool
    sums: int
    kept: tuple[str, ...]
    offloaded: tuple[str, ...] = ()


RECOMPUTED = {
    "none": Recomputed(False, False, 0, ("residual", "attention", "products", "weights")),
    "products": Recomputed(False, False, 2, ("residual", "attention", "products")),
    "attention": Recomputed(True, False, 3, ("residual", "attention")),
    "full": Recomputed(True, True, 3, ("residual",)),
    "offload_products": Recomputed(False, False, 2, ("residual",), ("attention", "products")),
    "offload": Recomputed(True, True, 3, (), ("residual",)),
}


class Machine(NamedTuple):
    """Devices in a mesh, and what is the same for all steps on it.

    Attributes:
        shape: mesh axis → size.
        chip: figures of a device.
        bandwidth: mesh axes → bytes/s that a device sends to those with which it shares them.
        kernel: of attention.
        state: bytes of a step's arguments for each byte of the weights.
    """

    shape: Mapping[str, int]
    chip: Chip
    bandwidth: Callable[[tuple[str, ...]], float]
    kernel: str
    state: float


def estimate(config: Config, machine: Machine) -> Estimate:
    """What the step of a resolved config will take on a mesh on which it is legal."""
    return _Step(config, machine).estimate()


class _Step:
    def __init__(self, config: Config, machine: Machine):
        self.config, self.machine, self.chip = config, machine, machine.chip
        self.model, self.layout = config.model, training_layout(config.mesh)
        self.again = RECOMPUTED[config.model.remat_policy]
        self.parts = config.train.accumulation_steps
        T = config.data.segment_length
        # Rows of a part on a device, its positions inside the floors, and those between them.
        self.rows = config.train.batch_size / self.parts / self.size("batch")
        self.inside = self.rows * T / self.size("time")
        self.between = self.rows * T / self.size("sequence")
        table = parameter_table(config.model)
        # Numbers that a device has of each matrix of a layer once it is gathered, and of the unembedding.
        self.matrices = {
            name.removeprefix("blocks."): math.prod(p.shape[1:]) / self.size(*(a for a in p.axes if a != "model"))
            for name, p in table.items()
            if p.role == "matrix"
        }
        self.layer = sum(self.matrices.values())
        self.weight_bytes = F32 * sum(math.prod(p.shape) / self.size(*p.axes) for p in table.values())
        self.state_bytes = self.weight_bytes * machine.state
        self.head = math.prod(table["embedding.table"].shape) / self.size("vocabulary")
        assert self.model.head_dim
        assert self.model.num_kv_heads
        self.heads = self.model.num_heads * self.model.head_dim / self.size("heads")
        self.keys = self.model.num_kv_heads * self.model.head_dim / self.size("kv_heads")

    def size(self, *axes: str) -> int:
        """The devices that share any of these logical axes."""
        return math.prod(self.machine.shape[name] for name in self.layout.mesh_axes(*axes))

    def estimate(self) -> Estimate:
        """All sums."""
        moved = 2 * self.parts * self.kept_bytes(self.again.offloaded)
        return Estimate(
            self.held_bytes(),
            self.state_bytes,
            self.compute_seconds(),
            self.communication_seconds(),
            moved / self.chip.host_bandwidth,
        )

    # ── Time ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def compute_seconds(self) -> float:
        """Products, attention's kernel, and what the memory moves beside them."""
        c, L, chip = self.model, self.model.num_layers, self.chip
        again = self.layer - self.matrices["feedforward.down"] if self.again.products else 0.0
        products = 2 * self.inside * (L * (3 * self.layer + again) + 3 * self.head)
        forward, backward = PAIRS[self.machine.kernel]
        pairs = 2 * self.inside * self.config.data.segment_length * self.heads * L
        kernel = pairs * (backward + forward * (2 if self.again.kernel else 1))
        stream, results = self.inside * c.model_dim, self.inside * self.results()
        moved = L * BF16 * (MOVED[0] * stream + MOVED[1] * results)
        of_part = products / PRODUCTS.get(chip.name, 1.0) / chip.peak_flops + kernel / chip.peak_flops
        return self.parts * (of_part + moved / chip.memory_bandwidth) + 2.5 * self.state_bytes / chip.memory_bandwidth

    def results(self) -> float:
        """Numbers a position that a layer's products give, but for residuals."""
        residual = ("attention.output", "feedforward.down")
        width = self.model.model_dim
        return sum(size / width for name, size in self.matrices.items() if name not in residual)

    def communication_seconds(self) -> float:
        """Weights, gradients, residuals, keys, look-ups."""
        c, L, parts = self.model, self.model.num_layers, self.parts
        gathers = 1 if "weights" in self.again.kept else 2
        seconds = parts * (L * self.weights(self.layer, gathers) + self.weights(self.head, 1))
        stream = self.inside * c.model_dim * BF16
        over = self.layout.mesh_axes("sequence") - self.layout.mesh_axes("time")
        seconds += parts * L * (8 + self.again.sums) * self.sent("gather", stream, over)
        # The head: positions gathered, and the sums of their gradients.
        seconds += parts * 2 * self.sent("gather", stream, over)
        keys = self.rows * self.config.data.segment_length * 2 * self.keys * BF16
        passes = 3 if self.again.kernel or self.again.products or self.again.sums else 2
        seconds += parts * L * passes * self.sent("gather", keys, self.layout.mesh_axes("time"))
        return seconds

    def weights(self, count: float, gathers: int) -> float:
        """Seconds of gathering so many weights and of summing their gradients, one mesh axis after the other."""
        stored, seconds = as_tuple(self.layout.rules.get("model")), 0.0
        left = count * BF16
        for i, name in enumerate(stored):
            whole = frozenset(stored) >= frozenset(n for n, size in self.machine.shape.items() if size > 1) and i == 0
            kind = "sum" if whole and self.chip.platform == "tpu" else "scatter"
            seconds += gathers * self.sent("gather", left, {name}) + self.sent(kind, left, {name})
            left /= self.machine.shape[name]
        return seconds + self.sent("sum", left, self.layout.token_axes - set(stored))

    def sent(self, kind: str, payload: float, over: frozenset[str] | set[str]) -> float:
        """Seconds that a ring takes for a payload as `train.planning.operations` counts it."""
        axes = tuple(name for name, size in self.machine.shape.items() if name in over and size > 1)
        if not axes:
            return 0.0
        n = math.prod(self.machine.shape[name] for name in axes)
        return payload * (n - 1) / n * (2 if kind == "sum" else 1) / self.machine.bandwidth(axes)

    # ── Memory ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def kept_bytes(self, names: tuple[str, ...]) -> float:
        """Bytes that the forward pass of all layers leaves for the backward pass."""
        stream, results = self.between * self.model.model_dim, self.inside * self.results()
        each = {
            "residual": stream,
            "attention": self.inside * self.heads,
            "products": results + 2 * stream,
            "weights": self.layer + 2 * self.inside * self.model.model_dim + 2 * results,
        }
        return self.model.num_layers * BF16 * sum(each[name] for name in names)

    def held_bytes(self) -> float:
        """The state, what waits for the backward pass, and what one layer or a chunk of the loss takes."""
        c, results = self.model, self.inside * self.results()
        kept = self.kept_bytes(self.again.kept)
        # Of parts those of the last and the sum; else in bfloat16.
        gradients = self.weight_bytes * (1.75 if self.parts > 1 else 0.5)
        chunk = min(c.loss_chunk or math.inf, self.between) * self.size("vocabulary")
        loss = self.head * (BF16 + F32) + chunk * 2 * F32 * self.head / c.model_dim
        layer = HELD[0] * BF16 * self.inside * c.model_dim + HELD[1] * BF16 * self.layer + 2 * BF16 * results
        return self.state_bytes + kept + max(gradients + layer, loss)
