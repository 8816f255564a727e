"""The training step: one optimizer update over one global batch."""

from collections.abc import Callable
from functools import cached_property, partial
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from model.context_parallel import from_zigzag, to_zigzag
from model.decoder import Decoder
from model.dropout import DropoutKeys, row_keys
from model.feedforward.balance import fullest_shard, load_figures, load_of_groups, moved_bias, routing_loss
from model.parameters import Parameter, parameter_table
from model.sharding import Layout
from model.trees import nested
from train.config.config import ResolvedConfig
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options, sum_counts, sum_loss_weights, sum_loss_weights_and_tokens
from train.step.objective import (
    OF_TOKENS,
    Batch,
    Sums,
    log_probabilities,
    pair_counts,
    sum_names,
    summed_objective,
)
from train.step.schedule import accumulation_parts, batch_size, learning_rate
from train.step.state import State, Weights, abstract_state
from train.step.watch import watch

Metrics = dict[str, Any]


class WholeBatch(NamedTuple):
    """The figures of a whole batch for the loss of a part: the sum of its loss weights or its pairs, and its tokens.

    Attributes:
        load_LE: the tokens of each expert; None where the part is the whole.
    """

    loss_weight: jax.Array
    num_tokens: jax.Array
    load_LE: jax.Array | None = None


def summed_loss(
    config: ResolvedConfig,
    weights: Weights,
    batch: Batch,
    keys_B: DropoutKeys = None,
    whole: WholeBatch | None = None,
    reference: Weights | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the minimized loss, and the sums of `summed_objective`, "loss" among them.

    Of next tokens, both are summed by `loss_weights`, and "loss" is the cross-entropy; of pairs, both are the sum over
    the pairs. With `whole` the losses of experts are added, by the weight of the whole batch; "load" is that of
    `load_of_groups`. The `reference` is that of the state.
    """
    layout = training_layout(config.mesh)
    batch = {name: to_zigzag(x, layout) for name, x in batch.items()}
    decoder = Decoder(config.model, weights, layout)
    x_BTD, routing = decoder.with_routing(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B)
    reference_BT = None if reference is None else log_probabilities(config, reference, batch, layout)
    objective, sums = summed_objective(config, decoder, x_BTD, batch, layout, reference_BT)
    if routing is None or whole is None:
        return objective, sums
    load_LGE = load_of_groups(routing, layout)
    load_LE = jnp.sum(load_LGE, axis=1) if whole.load_LE is None else whole.load_LE
    added = whole.loss_weight * routing_loss(config.model, routing, load_LE, whole.num_tokens)
    return objective + added, sums | {"load": load_LGE}


def load_of(config: ResolvedConfig, weights: Weights, batch: Batch, keys_B: DropoutKeys) -> jax.Array:
    """Returns the load of a part of a batch, as `summed_loss`, by a forward pass."""
    layout = training_layout(config.mesh)
    tokens, positions, ids = (to_zigzag(batch[name], layout) for name in ("tokens", "positions", "segment_ids"))
    routing = Decoder(config.model, weights, layout).with_routing(tokens, positions, ids, keys_B)[1]
    assert routing
    return load_of_groups(routing, layout)


def update_average(config: ResolvedConfig, average: Weights, weights: Weights, step: jax.Array) -> Weights:
    """Returns the moving average of the weights after update `step` (Polyak and Juditsky 1992), in float32.

    The decay starts lower, at (1 + t)/(10 + t) as in TensorFlow's ExponentialMovingAverage: otherwise the initial
    weights would remain in the average for thousands of steps.
    """
    t = step.astype(jnp.float32)
    decay = jnp.minimum(config.train.ema_decay, (1 + t) / (10 + t))
    return optax.incremental_update(weights, average, 1 - decay)


def split_rows(parts: int, tree: Any, layout: Layout) -> Any:
    """Splits arrays [B, ...] into [parts, B / parts, ...]; part a takes rows a, a + parts, ..., so no row moves."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        # When a part has a single row, the reshape loses which axis is sharded; this restores it.
        return layout.reshard(x, "batch", *(None,) * (x.ndim - 1)).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def sums_and_gradients(
    config: ResolvedConfig,
    weights: Weights,
    batch: Batch,
    keys_B: DropoutKeys,
    whole: WholeBatch | None,
    reference: Weights | None,
) -> tuple[Sums, Weights]:
    """Returns the sums of `summed_loss`, and the gradients of its loss."""
    objective = partial(summed_loss, config, batch=batch, keys_B=keys_B, whole=whole, reference=reference)
    (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
    return sums, gradients


def accumulated(
    config: ResolvedConfig,
    parts: int,
    weights: Weights,
    batch: Batch,
    keys_B: DropoutKeys,
    whole: WholeBatch | None,
    reference: Weights | None,
) -> tuple[Sums, Weights]:
    """Returns the same as `sums_and_gradients`, of one part of the batch after another."""
    split = split_rows(parts, (batch, keys_B), training_layout(config.mesh))
    sums = dict.fromkeys(sum_names(config.objective), jnp.zeros(()))
    if whole:
        one = {name: x[0] for name, x in split[0].items()}
        sums["load"] = jnp.zeros(jax.eval_shape(partial(load_of, config), weights, one, None).shape)
        if config.model.balance_loss and config.model.balance_over == "batch":
            # The balance loss of a part needs the load of all.
            count = lambda total, part: (total + load_of(config, weights, *part), None)
            whole = whole._replace(load_LE=jnp.sum(jax.lax.scan(count, sums["load"], split)[0], axis=1))

    # Copies of a matrix have sums of their own, which are added once after the last part.
    replicas, table = training_layout(config.mesh).replica_axes, parameter_table(config.model)
    later = nested({name: replicas if sums_later(table[name]) else frozenset() for name in table})
    copies = jax.tree.map(lambda w, axes: _resharded(w, reduced=axes), weights, later)
    zeros = jax.tree.map(lambda w, axes: _resharded(jnp.zeros_like(w), unreduced=axes), weights, later)

    def add(total: Any, part: tuple[Batch, DropoutKeys]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_and_gradients(config, copies, *part, whole, reference)), None

    sums, gradients = jax.lax.scan(add, (sums, zeros), split)[0]
    # They are sent in the dtype of those of a whole batch.
    dtype = jnp.dtype(config.model.compute_dtype)
    summed = lambda x, axes: _resharded(x.astype(dtype)).astype(x.dtype) if axes else x
    return sums, jax.tree.map(summed, gradients, later)


def sums_later(parameter: Parameter) -> bool:
    """True for weights that `gather_weight` gathers for use, whose gradient it leaves unsummed over copies."""
    # The gate of smear and a reward head are vectors, which are not gathered.
    is_gate = parameter.role == "gate" and "model" in parameter.axes
    is_matrix = parameter.role in ("matrix", "unembedding") and "width" not in parameter.axes
    return (is_matrix or is_gate) and "experts" not in parameter.axes


def _resharded(x: jax.Array, **partial: frozenset[str]) -> jax.Array:
    """Returns an array in the same shards, whose sums over replicas are done, or are still to be done."""
    return jax.reshard(x, PartitionSpec(*jax.typeof(x).sharding.spec.partitions, **partial))


class Counts(NamedTuple):
    """The loss weight of a batch, what the losses of experts need, and of pairs the trained tokens."""

    loss_weight: jax.Array
    whole: WholeBatch | None
    answer_tokens: jax.Array | None


def counted(config: ResolvedConfig, batch: Batch) -> tuple[Batch, Counts]:
    """Returns the batch, and its counts."""
    answer_tokens = None
    if config.objective.compares:
        batch, (loss_weight, answer_tokens, num_tokens) = sum_counts(batch, pair_counts(batch))
    elif config.model.num_experts:
        batch, loss_weight, num_tokens = sum_loss_weights_and_tokens(batch)
    else:
        batch, loss_weight = sum_loss_weights(batch)
    whole = WholeBatch(loss_weight, jnp.maximum(num_tokens, 1.0)) if config.model.num_experts else None
    return batch, Counts(loss_weight, whole, answer_tokens)


def make_train_step(
    config: ResolvedConfig, optimizer: optax.GradientTransformation, watches: bool = False
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Returns the jitted function (state, batch) → (state, metrics), which donates the memory of its state.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` (int32) and `loss_weights` (float32), each [B, T]; one
    of sampled answers also the `advantages` (float32) of their tokens. Gradient accumulation with `accumulation_steps`
    = A runs A parts of B/A rows in sequence (fewer on a batch ramp); the loss is divided by the weight of the whole
    batch, so A changes only memory. Metrics are float32 scalars: `loss` in nats a token, `grad_norm` before clipping,
    `learning_rate`, and `loss_weight`, the number of tokens that count. Of sampled answers, the other sums of
    `policy_loss` are means, too. Of pairs of answers, `loss` is that of a pair, `loss_weight` their number, and
    `answer_tokens` that of the trained tokens; the other sums of `preference_loss` are means: `kl` of a token, the
    others of a pair. A watching step also returns `watch` (see `watch.py`), at the cost of one more forward pass. The
    function is compiled for the platform of the ambient mesh.
    """
    layout = training_layout(config.mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch, counts = counted(config, batch)
        keys_B = None
        if config.model.dropout:
            rows_B = jnp.arange(batch["tokens"].shape[0], out_sharding=layout.spec("batch"))
            keys_B = row_keys(config.train.seed, state["step"], rows_B)
        update = partial(one_update, config, optimizer, watches, keys_B, counts)
        if config.objective.updates > 1:
            after, metrics = one_after_another(config, update, state, batch)
        else:
            after, metrics = update(state, batch)
        after["step"] = state["step"] + 1
        if config.train.ema_decay:
            after["average"] = update_average(config, state["average"], after["weights"], state["step"])
        return after, metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())


def one_update(
    config: ResolvedConfig,
    optimizer: optax.GradientTransformation,
    watches: bool,
    keys_B: DropoutKeys,
    counts: Counts,
    state: State,
    batch: Batch,
) -> tuple[State, Metrics]:
    """Returns the state with other weights and moments, and the metrics, after one update with the batch."""
    parts, layout = accumulation_parts(config, batch["tokens"].shape[0]), training_layout(config.mesh)
    run = partial(sums_and_gradients, config) if parts == 1 else partial(accumulated, config, parts)
    loss_weight, whole, answer_tokens = counts
    sums, gradients = run(state["weights"], batch, keys_B, whole, state.get("reference"))
    of_tokens = OF_TOKENS if answer_tokens is not None else ()
    averaged = {name: sums[name] for name in sum_names(config.objective) if name not in of_tokens}
    figures, gradients = jax.tree.map(lambda x: x / jnp.maximum(loss_weight, 1.0), (averaged, gradients))

    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["weights"])
    metrics = figures | {
        "grad_norm": optax.tree.norm(gradients),
        "learning_rate": learning_rate(config)(state["step"]),
        "loss_weight": loss_weight,
    }
    if answer_tokens is not None:
        metrics["answer_tokens"] = answer_tokens
        metrics |= {name: sums[name] / jnp.maximum(answer_tokens, 1.0) for name in of_tokens if name in sums}
    if watches:
        metrics["watch"] = watch(config, state["weights"], split_rows(parts, batch, layout), gradients, updates)
    if "load" in sums:
        load_LE = jnp.sum(sums["load"], axis=1)
        load = load_figures(load_LE)
        metrics |= expert_figures(load)
        if watches:
            fullest = fullest_shard(sums["load"], layout.size("experts"))
            metrics["watch"]["experts"] = load | {"fullest_shard": fullest}
    weights = optax.apply_updates(state["weights"], updates)
    if config.model.balance_bias:
        experts = weights["blocks"]["experts"]
        experts["balance"] = moved_bias(config.model, experts["balance"], load_LE)
    return state | {"weights": weights, "optimizer": optimizer_state}, metrics


def one_after_another(
    config: ResolvedConfig, update: Callable[[State, Batch], tuple[State, Metrics]], state: State, batch: Batch
) -> tuple[State, Metrics]:
    """Returns the same after `objective.updates` updates with a batch of sampled answers; metrics are their means."""
    batch = {**batch, "old_log_p": log_probabilities_of(config, state["weights"], batch)}
    changed = ("weights", "optimizer")

    def again(before: State, _: None) -> tuple[State, Metrics]:
        # All updates of a step have its learning rate.
        before["optimizer"] |= {"schedule": state["optimizer"]["schedule"]}
        after, metrics = update(state | before, batch)
        return {name: after[name] for name in changed}, metrics

    first = {name: state[name] for name in changed}
    after, metrics = jax.lax.scan(again, first, length=config.objective.updates)
    return state | after, jax.tree.map(partial(jnp.mean, axis=0), metrics)


def log_probabilities_of(config: ResolvedConfig, weights: Weights, batch: Batch) -> jax.Array:
    """Returns log p(target) [B, T] of a batch, in the order of its rows and by as many parts as its gradients."""
    layout = training_layout(config.mesh)
    parts = accumulation_parts(config, batch["tokens"].shape[0])

    def of_part(part: Batch) -> jax.Array:
        part = {name: to_zigzag(x, layout) for name, x in part.items()}
        return from_zigzag(log_probabilities(config, weights, part, layout), layout)

    split = jax.lax.map(of_part, split_rows(parts, batch, layout))
    return layout.reshard(split.swapaxes(0, 1), "batch", None, "time").reshape(batch["tokens"].shape)


def skip_step(config: ResolvedConfig, state: State) -> tuple[State, Metrics]:
    """Returns (state, metrics) after a batch without a trained token: only the step and the schedule advance.

    Without a gradient an update would be momentum alone, and Muon and Lion would take a step of full size with it.
    """
    schedule = jax.tree.map(lambda count: count + 1, state["optimizer"]["schedule"])
    after = {"step": state["step"] + 1, "optimizer": state["optimizer"] | {"schedule": schedule}}
    rate = learning_rate(config)(state["step"])
    return state | after, dict.fromkeys(("loss", "grad_norm", "loss_weight"), 0 * rate) | {"learning_rate": rate}


def abstract_batch(config: ResolvedConfig, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch, [rows, T] each."""
    sharding = batch_sharding(mesh, training_layout(config.mesh))
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32) | {"loss_weights": jnp.float32}
    if config.objective.samples:
        dtypes["advantages"] = jnp.float32
    shape = (rows, config.data.segment_length)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def expert_figures(figures: dict[str, jax.Array]) -> Metrics:
    """Returns the worst of each of `load_figures` over all layers, and the number of all experts without a token."""
    return {
        "expert_load_most": jnp.max(figures["most"]),
        "expert_load_least": jnp.min(figures["least"]),
        "expert_load_entropy": jnp.min(figures["entropy"]),
        "dead_experts": jnp.sum(figures["dead"]),
    }


class StepPrograms:
    """The compiled programs of a run's steps: one for each batch size, with and without watching.

    Steps are numbered from 1 here, as in the log. `skip` is `skip_step` as a program that donates its state.
    """

    def __init__(self, config: ResolvedConfig, optimizer: optax.GradientTransformation):
        self.config = config
        self._optimizer = optimizer
        self._compiles = Lock()
        self.skip = jax.jit(partial(skip_step, config), donate_argnums=0)
        self._compiled: dict[tuple[int, bool], jax.stages.Compiled] = {}

    @cached_property
    def _functions(self) -> Any:
        return {watches: make_train_step(self.config, self._optimizer, watches) for watches in (False, True)}

    def __call__(self, step: int, state: State, batch: Batch) -> tuple[State, Metrics]:
        """Runs step number `step`: (state, batch) → (state, metrics), as `make_train_step`."""
        _, watches = self._kind(step)
        result: tuple[State, Metrics] = self._functions[watches](state, batch)
        return result

    def has(self, step: int) -> bool:
        """True if the program of step number `step` has been compiled."""
        return self._kind(step) in self._compiled

    def compiled(self, step: int, state: Any, batch: Any) -> jax.stages.Compiled:
        """Returns the program of step number `step`, and compiles it if necessary.

        State and batch may be shapes. Where another thread compiles, this waits for it.
        """
        kind = self._kind(step)
        with self._compiles:
            if kind not in self._compiled:
                # jit finds this program in its cache when it is called.
                self._compiled[kind] = self._functions[kind[1]].lower(state, batch).compile()
            return self._compiled[kind]

    def compile_ahead(self, step: int) -> None:
        """Compiles the program of step number `step` on the ambient mesh, before there is a state or a batch."""
        rows, _ = self._kind(step)
        batch = abstract_batch(self.config, jax.sharding.get_mesh(), rows)
        self.compiled(step, abstract_state(self.config, self._optimizer), batch)

    def _kind(self, step: int) -> tuple[int, bool]:
        every = self.config.train.watch_every_steps
        return batch_size(self.config, step - 1), bool(every) and step % every == 0
