"""Objectives of a batch: the cross-entropy of its next tokens, or a loss of the answers in it.

Every other loss than the cross-entropy is a function f of the log-probabilities of single tokens, and of arrays that do
not depend on the weights. So f's gradient reaches the model as one number a token, ∂f/∂log p. The log-probabilities are
computed first, in chunks and without gradients; then the cross-entropy, weighted by minus these numbers, has f's value
of the gradient, through the same chunked loss as in pretraining. No logits of a whole batch are made.

With the chosen answer w, the rejected answer l, and σ the logistic function, a pair's losses are

    dpo    -log σ(r_w − r_l),      r = β Σ (log p − log p_ref)    (Rafailov et al. 2023, arXiv:2305.18290, equation 7)
    simpo  -log σ(r_w − r_l − γ),  r = β/n Σ log p                (Meng et al. 2024, arXiv:2405.14734, equation 6)

where Σ is over the n trained tokens of an answer, its end included. With `objective.length_normalized` r of dpo is
divided by n, too. With a label smoothing ε they are -(1 − ε) log σ(z) − ε log σ(−z) (conservative DPO, Mitchell 2023).

The loss of a token of a sampled answer with the advantage A (see `train.rollout`) is

    grpo   -min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β (p_ref / p − log(p_ref / p) − 1),    ρ = p / p_old

with ε = `objective.clip` and β = `objective.kl_weight` (Shao et al. 2024, arXiv:2402.03300, equations 3 and 4), where
p_old is the probability before the first of the updates that are made with the answers. All tokens of a batch count
alike (DAPO, Yu et al. 2025, arXiv:2503.14476, equation 8), or with `objective.length_normalized` all answers, as in the
former paper.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.decoder import Decoder
from model.loss import summed_losses, token_losses
from model.sharding import Layout
from train.config.config import ResolvedConfig
from train.config.objective_config import ObjectiveConfig
from train.step.state import Weights

Batch = Mapping[str, jax.Array]
# Sums over a batch, which are added up over its parts.
Sums = dict[str, jax.Array]
# Sums over pairs, which are reported as means of a pair.
OF_PAIRS = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
# Sums over the trained tokens of a reference's objective, which are reported as means of a token.
OF_TOKENS = ("kl",)
# Sums over the tokens of sampled answers, by their loss weights, which are reported as means: the loss; -log p, whose
# mean estimates the entropy; and where the gradient of the advantage is cut off.
OF_SAMPLES = ("loss", "entropy", "clipped")


def sum_names(config: ObjectiveConfig) -> tuple[str, ...]:
    """Returns the names of the sums of `summed_objective`."""
    if config.name == "next_token":
        return ("loss",)
    return (*(OF_SAMPLES if config.samples else OF_PAIRS), *(OF_TOKENS if config.uses_reference else ()))


def summed_objective(
    config: ResolvedConfig,
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    batch: Batch,
    layout: Layout,
    reference_BT: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the minimized loss, and the sums by `sum_names`, over a batch in the order of the layout.

    Args:
        x_BTD: the decoder's last residual stream, by which and by the matrix the loss has gradients.
        reference_BT: `log_probabilities` of the reference, if the objective uses one.
    """
    targets_BT = batch["targets"]
    if config.objective.name == "next_token":
        losses = summed_losses(x_BTD, matrix_DV, targets_BT, batch["loss_weights"], config.model, layout)
        return losses.objective, {"loss": losses.cross_entropy}
    fixed = jax.lax.stop_gradient((x_BTD, matrix_DV))
    log_p_BT = -token_losses(*fixed, targets_BT, config.model, layout).cross_entropy
    if config.objective.samples:
        loss = partial(policy_loss, config.objective, batch=batch, reference_BT=reference_BT)
        loss = partial(loss, old_BT=batch.get("old_log_p", log_p_BT))
    else:
        loss = partial(preference_loss, config.objective, batch=batch, layout=layout, reference_BT=reference_BT)
    (value, sums), slope_BT = jax.value_and_grad(loss, has_aux=True)(log_p_BT)
    # The cross-entropy is -log p, so this has the gradient of the loss, and another value.
    linear = summed_losses(x_BTD, matrix_DV, targets_BT, -slope_BT, config.model, layout).objective
    return value + (linear - jax.lax.stop_gradient(linear)), sums


def log_probabilities(config: ResolvedConfig, weights: Weights, batch: Batch, layout: Layout) -> jax.Array:
    """Returns log p(target) in nats [B, T], without dropout, over a batch in the order of the layout."""
    decoder = Decoder(config.model, weights, layout)
    x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
    return -token_losses(x_BTD, decoder.unembedding_matrix(), batch["targets"], config.model, layout).cross_entropy


def preference_loss(
    config: ObjectiveConfig,
    log_p_BT: jax.Array,
    batch: Batch,
    layout: Layout,
    reference_BT: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the loss of all pairs of a batch (formulas above), and sums over them by name.

    These are "loss"; "accuracy", 1 for a pair whose chosen answer has the higher reward r; "margin", r_w − r_l;
    "chosen_reward", r_w; and "rejected_reward", r_l. "kl", with a reference, is the sum over the trained tokens of both
    answers of ½ (log p − log p_ref)², the estimator k2 of the KL divergence to the reference (Schulman 2020). Answers
    of a data set are no samples of the model, for which alone it would estimate that; here it measures the distance.
    """
    ratio_BT = log_p_BT if reference_BT is None else log_p_BT - reference_BT
    n_BP = answer_sums(jnp.ones_like(log_p_BT), batch, layout)
    scale = config.reward_factor
    r_w, r_l = (
        scale * x_BP / (jnp.maximum(n, 1) if config.per_token else 1)
        for x_BP, n in zip(answer_sums(ratio_BT, batch, layout), n_BP, strict=True)
    )
    z_BP = r_w - r_l - (config.gamma if config.name == "simpo" else 0.0)
    smoothing = config.label_smoothing
    loss_BP = -(1 - smoothing) * jax.nn.log_sigmoid(z_BP) - smoothing * jax.nn.log_sigmoid(-z_BP)
    of_pairs = (loss_BP, (r_w > r_l).astype(jnp.float32), r_w - r_l, r_w, r_l)
    is_pair_BP = n_BP[0] > 0
    sums = {name: jnp.sum(jnp.where(is_pair_BP, x, 0.0)) for name, x in zip(OF_PAIRS, of_pairs, strict=True)}
    if reference_BT is not None:
        sums["kl"] = jnp.sum(batch["loss_weights"] * ratio_BT**2) / 2
    return sums["loss"], sums


def policy_loss(
    config: ObjectiveConfig,
    log_p_BT: jax.Array,
    batch: Batch,
    old_BT: jax.Array,
    reference_BT: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the loss of all sampled tokens of a batch (formula above), and sums over them by name.

    The batch has the "advantages" of the tokens [B, T], and all is weighted by "loss_weights". "kl" estimates the KL
    divergence to the reference without bias (k3; Schulman 2020).
    """
    weights_BT, A_BT = batch["loss_weights"], batch["advantages"]
    # Positions without weight may have any probabilities, whose ratio would be infinite.
    difference = lambda x_BT, y_BT: jnp.where(weights_BT > 0, x_BT - y_BT, 0.0)
    ratio_BT = jnp.exp(difference(log_p_BT, old_BT))
    gain_BT, bound_BT = ratio_BT * A_BT, jnp.clip(ratio_BT, 1 - config.clip, 1 + config.clip) * A_BT
    loss_BT = -jnp.minimum(gain_BT, bound_BT)
    of_tokens = {"entropy": -log_p_BT, "clipped": (bound_BT < gain_BT).astype(jnp.float32)}
    if reference_BT is not None:
        further_BT = difference(reference_BT, log_p_BT)
        of_tokens["kl"] = jnp.expm1(further_BT) - further_BT
        loss_BT = loss_BT + config.kl_weight * of_tokens["kl"]
    sums = {name: jnp.sum(weights_BT * x_BT) for name, x_BT in ({"loss": loss_BT} | of_tokens).items()}
    return sums["loss"], sums


def answer_sums(x_BT: jax.Array, batch: Batch, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of x over the trained tokens of each chosen and each rejected answer, [B, T // 2] each.

    The chosen answer of pair k of a row has segment id 2k − 1, and the rejected one 2k (see `data.segmenter`), so the
    order of the positions does not matter. Pairs that a row does not have are 0.
    """
    num_ids, shared = 2 * (x_BT.shape[1] // 2) + 1, tuple(layout.mesh_axes("time"))

    def add_up(x_BT: jax.Array, ids_BT: jax.Array) -> jax.Array:
        sums_BS = jax.vmap(partial(jax.ops.segment_sum, num_segments=num_ids))(x_BT, ids_BT)
        return jax.lax.psum(sums_BS, shared) if shared else sums_BS

    if layout.rules:
        # Each device adds up its own positions of its rows.
        positions, sums = layout.spec("batch", "time"), layout.spec("batch", None)
        add_up = jax.shard_map(add_up, in_specs=(positions, positions), out_specs=sums)
    sums_BS = add_up(x_BT * batch["loss_weights"], batch["segment_ids"])
    return sums_BS[:, 1::2], sums_BS[:, 2::2]


def pair_counts(batch: Batch) -> list[Any]:
    """Returns arrays [B, T] whose sums are the numbers of pairs, of trained tokens of answers, and of all tokens."""
    ids = batch["segment_ids"]
    begins = (ids % 2 == 1) & (batch["positions"] == 0)
    return [begins.astype(jnp.float32), batch["loss_weights"], (ids > 0).astype(jnp.float32)]
