"""The training step: one optimizer update over one global batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.backend import platform
from model.decoder import Decoder
from model.dropout import Keys, row_keys
from model.loss import Losses, summed_losses
from model.sharding import Layout
from train.config.config import Config
from train.devices.rules import training_layout
from train.devices.xla import compiler_options
from train.step.schedule import accumulation_parts, batch_size, learning_rate
from train.step.state import State
from train.step.watch import watch

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]


def summed_loss(config: Config, weights: dict[str, Any], batch: Batch, keys_B: Keys = None) -> Losses:
    """What training minimizes and the cross-entropy, summed over the batch by its loss weights."""
    layout = training_layout(config.mesh)
    batch = {name: layout.spread(x) for name, x in batch.items()}
    decoder = Decoder(config.model, weights, layout)
    x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"], keys_B)
    matrix_DV = decoder.unembedding_matrix()
    return summed_losses(x_BTD, matrix_DV, batch["targets"], batch["loss_weights"], config.model, layout)


def counted(batch: Batch) -> tuple[Batch, jax.Array]:
    """The batch, and its loss weights summed.

    On CPUs all else waits for the sum: devices of jax 0.12's runtime may begin it before a loop or after it, each as
    it likes, and then wait for one another's collectives without end.
    """
    total = jnp.sum(batch["loss_weights"])
    if platform() == "cpu":
        batch = {**batch, "tokens": jnp.where(total >= 0, batch["tokens"], 0)}
    return batch, total


def averaged(config: Config, average: dict[str, Any], weights: dict[str, Any], step: jax.Array) -> dict[str, Any]:
    """The moving average of the weights after the update numbered `step` (Polyak and Juditsky 1992), float32.

    At first it forgets faster, with decay (1 + t)/(10 + t) as in TensorFlow's ExponentialMovingAverage: otherwise the
    initial weights would be in it for thousands of steps.
    """
    t = step.astype(jnp.float32)
    decay = jnp.minimum(config.train.ema_decay, (1 + t) / (10 + t))
    return optax.incremental_update(weights, average, 1 - decay)


def in_parts(parts: int, tree: Any, layout: Layout) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]: part a takes rows a, a + parts, ..., so devices keep their rows."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        # A reshape forgets on which axis the shards of a single row are.
        return layout.place(x, "batch", *(None,) * (x.ndim - 1)).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, watches: bool = False
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The compiled function (state, batch) → (state, metrics); it takes the memory of the state it is given.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` (int32) and `loss_weights` (float32), each [B, T].
    With `accumulation_steps` = A, parts of B/A rows run one after the other (a smaller batch of a ramp has fewer);
    the loss is divided by the weight of the whole batch, so that A changes nothing but memory. Metrics are float32
    scalars: `loss` in nats a token, `grad_norm` before clipping, `learning_rate`, `loss_weight` (the tokens that
    counted). A step that watches also returns `watch` (see `watch.py`), for one more forward pass. The function is
    for the platform of the ambient mesh.
    """
    schedule, layout = learning_rate(config), training_layout(config.mesh)

    def gradient(weights: dict[str, Any], batch: Batch, keys_B: Keys) -> tuple[jax.Array, dict[str, Any]]:
        objective = partial(summed_loss, config, batch=batch, keys_B=keys_B)
        (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
        return loss, gradients

    def accumulated(
        parts: int, weights: dict[str, Any], batch: Batch, keys_B: Keys
    ) -> tuple[jax.Array, dict[str, Any]]:
        def add(total: Any, part: tuple[Batch, Keys]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(weights, *part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        return jax.lax.scan(add, zeros, in_parts(parts, (batch, keys_B), layout))[0]

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch, loss_weight = counted(batch)
        keys_B = None
        if config.model.dropout:
            rows_B = jnp.arange(batch["tokens"].shape[0], out_sharding=layout.spec("batch"))
            keys_B = row_keys(config.train.seed, state["step"], rows_B)
        parts = accumulation_parts(config, batch["tokens"].shape[0])
        gradient_of = gradient if parts == 1 else partial(accumulated, parts)
        loss, gradients = gradient_of(state["weights"], batch, keys_B)
        loss, gradients = jax.tree.map(lambda x: x / jnp.maximum(loss_weight, 1.0), (loss, gradients))

        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["weights"])
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state["step"]),
            "loss_weight": loss_weight,
        }
        if watches:
            metrics["watch"] = watch(config, state["weights"], in_parts(parts, batch, layout), gradients, updates)
        weights = optax.apply_updates(state["weights"], updates)
        after = {"step": state["step"] + 1, "weights": weights, "optimizer": optimizer_state}
        if config.train.ema_decay:
            after["average"] = averaged(config, state["average"], weights, state["step"])
        return after, metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())


class Programs:
    """The programs of a run's steps: one for each size of the batch, and one more for each that a watching step has.

    Steps are numbered from 1 here, as in the log.
    """

    def __init__(self, config: Config, optimizer: optax.GradientTransformation):
        self._config = config
        self._functions: Any = {watches: make_train_step(config, optimizer, watches) for watches in (False, True)}
        self._compiled: dict[tuple[int, bool], jax.stages.Compiled] = {}

    def __call__(self, step: int, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The step, as of `make_train_step`."""
        found: tuple[State, Metrics] = self._functions[self._kind(step)[1]](state, batch)
        return found

    def has(self, step: int) -> bool:
        """Whether the step's program is compiled already."""
        return self._kind(step) in self._compiled

    def compiled(self, step: int, state: State, batch: Batch) -> jax.stages.Compiled:
        """The step's program; compiled now, where it was not."""
        kind = self._kind(step)
        if kind not in self._compiled:
            # What is compiled so is what a call takes.
            self._compiled[kind] = self._functions[kind[1]].lower(state, batch).compile()
        return self._compiled[kind]

    def _kind(self, step: int) -> tuple[int, bool]:
        every = self._config.train.watch_every_steps
        return batch_size(self._config, step - 1), bool(every) and step % every == 0
