"""The training step: one optimizer update over one global batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.decoder import Decoder
from model.loss import token_log_probabilities
from train.config import Config
from train.mesh import TRAINING
from train.schedule import accumulation_parts, learning_rate
from train.state import State

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def summed_loss(config: Config, weights: dict[str, Any], batch: Batch) -> jax.Array:
    """Cross-entropy in nats, summed over the batch's positions by their loss weights; a float32 scalar."""
    decoder = Decoder(config.model, weights, TRAINING)
    x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
    matrix_DV, m = decoder.unembedding_matrix(), config.model
    assert m.vocab_size is not None
    log_p_BT = token_log_probabilities(x_BTD, matrix_DV, batch["targets"], m.vocab_size, m.loss_chunk, TRAINING)
    return -jnp.sum(log_p_BT * batch["loss_weights"])


def averaged(config: Config, average: dict[str, Any], weights: dict[str, Any], step: jax.Array) -> dict[str, Any]:
    """The moving average of the weights after the update numbered `step` (Polyak and Juditsky 1992), float32.

    At first it forgets faster, with decay (1 + t)/(10 + t) as in TensorFlow's ExponentialMovingAverage: otherwise the
    initial weights would be in it for thousands of steps.
    """
    t = step.astype(jnp.float32)
    decay = jnp.minimum(config.train.ema_decay, (1 + t) / (10 + t))
    return optax.incremental_update(weights, average, 1 - decay)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The compiled function (state, batch) → (state, metrics); it takes the memory of the state it is given.

    A batch holds `tokens`, `targets`, `positions`, `segment_ids` (int32) and `loss_weights` (float32), each [B, T].
    With `accumulation_steps` = A, parts of B/A rows run one after the other (a smaller batch of a ramp has fewer);
    the loss is divided by the weight of the whole batch, so that A changes nothing but memory. Metrics are float32
    scalars: `loss` in nats a token, `grad_norm` before clipping, `learning_rate`, `loss_weight` (the tokens that
    counted).
    """
    schedule = learning_rate(config)
    gradient = jax.value_and_grad(lambda weights, batch: summed_loss(config, weights, batch))

    def accumulated(parts: int, weights: dict[str, Any], batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        # Part a takes rows a, a + A, ...: every device keeps its own rows.
        split = {k: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(weights, part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        return jax.lax.scan(add, zeros, split)[0]

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        loss_weight = jnp.sum(batch["loss_weights"])
        parts = accumulation_parts(config, batch["tokens"].shape[0])
        gradient_of = gradient if parts == 1 else partial(accumulated, parts)
        loss, gradients = gradient_of(state["weights"], batch)
        loss, gradients = jax.tree.map(lambda x: x / jnp.maximum(loss_weight, 1.0), (loss, gradients))

        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["weights"])
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state["step"]),
            "loss_weight": loss_weight,
        }
        weights = optax.apply_updates(state["weights"], updates)
        after = {"step": state["step"] + 1, "weights": weights, "optimizer": optimizer_state}
        if config.train.ema_decay:
            after["average"] = averaged(config, state["average"], weights, state["step"])
        return after, metrics

    return jax.jit(train_step, donate_argnums=0)
