"""Objectives of a batch: the cross-entropy of its next tokens, or a loss of the answers in it.

dpo and simpo are functions f of the log-probabilities of single tokens, and of arrays that do not depend on the
weights. So f's gradient reaches the model as one number a token, ∂f/∂log p. The log-probabilities are computed first,
in chunks and without gradients; then the cross-entropy, weighted by minus these numbers, has f's value of the gradient,
through the same chunked loss as in pretraining. No logits of a whole batch are made. `reward` needs no logits at all.

With the chosen answer w, the rejected answer l, and σ the logistic function, a pair's losses are

    dpo    -log σ(r_w − r_l),      r = β Σ (log p − log p_ref)    (Rafailov et al. 2023, arXiv:2305.18290, equation 7)
    simpo  -log σ(r_w − r_l − γ),  r = β/n Σ log p                (Meng et al. 2024, arXiv:2405.14734, equation 6)
    reward -log σ(r_w − r_l),      r = the score of an answer   (Ouyang et al. 2022, arXiv:2203.02155, equation 1)

where Σ is over the n trained tokens of an answer, its end included. With `objective.length_normalized` r of dpo is
divided by n, too. That σ(r_w − r_l) is the probability that w is preferred is the model of Bradley and Terry (1952);
for reward, r is the value of the model's reward head (see `scores`). With a label smoothing ε the losses are
-(1 − ε) log σ(z) − ε log σ(−z) (conservative DPO, Mitchell 2023).

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

from model.context_parallel import to_zigzag
from model.decoder import Decoder
from model.loss import summed_losses, token_losses
from model.sharding import Layout
from train.config.config import ResolvedConfig
from train.config.objective_config import ObjectiveConfig
from train.devices.rules import training_layout
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
    decoder: Decoder,
    x_BTD: jax.Array,
    batch: Batch,
    layout: Layout,
    reference_BT: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the minimized loss, and the sums by `sum_names`, over a batch in the order of the layout.

    Args:
        x_BTD: the decoder's last residual stream, by which and by the last floor's weight the loss has gradients.
        reference_BT: `log_probabilities` of the reference, if the objective uses one.
    """
    if config.model.reward_head:
        return score_loss(config.objective, decoder.scores(x_BTD), batch, layout)
    targets_BT, matrix_DV = batch["targets"], decoder.unembedding_matrix()
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
    loss, sums = _pair_sums(config, r_w, r_l, n_BP[0] > 0)
    if reference_BT is not None:
        sums["kl"] = jnp.sum(batch["loss_weights"] * ratio_BT**2) / 2
    return loss, sums


def score_loss(config: ObjectiveConfig, score_BT: jax.Array, batch: Batch, layout: Layout) -> tuple[jax.Array, Sums]:
    """Returns as `preference_loss`, of the scores of a reward model at every position; a reward is a score."""
    score_BS, exists_BS = last_scores(score_BT, batch, layout)
    last = 2 * (score_BS.shape[1] // 2)
    return _pair_sums(config, score_BS[:, 0:last:2], score_BS[:, 1:last:2], exists_BS[:, 0:last:2])


def _pair_sums(
    config: ObjectiveConfig, r_w: jax.Array, r_l: jax.Array, is_pair_BP: jax.Array
) -> tuple[jax.Array, Sums]:
    """Returns the loss of all pairs, and the sums `OF_PAIRS`, given the rewards of their answers, [B, T // 2] each."""
    z_BP = r_w - r_l - (config.gamma if config.name == "simpo" else 0.0)
    smoothing = config.label_smoothing
    loss_BP = -(1 - smoothing) * jax.nn.log_sigmoid(z_BP) - smoothing * jax.nn.log_sigmoid(-z_BP)
    of_pairs = (loss_BP, (r_w > r_l).astype(jnp.float32), r_w - r_l, r_w, r_l)
    sums = {name: jnp.sum(jnp.where(is_pair_BP, x, 0.0)) for name, x in zip(OF_PAIRS, of_pairs, strict=True)}
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


def scores(config: ResolvedConfig, weights: Weights, batch: Batch) -> jax.Array:
    """Returns a reward model's score of each sequence of a batch in its natural order, float32 [B, T].

    Column k − 1 has the score of segment id k, and 0 where a row has no such sequence. It is the head's value at the
    sequence's last input: of a text the token before the end token, which is a target alone; of a conversation the
    token before the last one that its template writes. An exported `…ForSequenceClassification` reads the last token
    that it is given, so it gives the same score for these inputs.
    """
    layout = training_layout(config.mesh)
    batch = {name: to_zigzag(x, layout) for name, x in batch.items()}
    decoder = Decoder(config.model, weights, layout)
    score_BT = decoder.scores(decoder(batch["tokens"], batch["positions"], batch["segment_ids"]))
    return last_scores(score_BT, batch, layout)[0]


def pair_figures(
    config: ResolvedConfig, weights: Weights, reference: Weights | None, batch: Batch, layout: Layout
) -> Sums:
    """Returns the sums of the objective over the pairs of a batch in the order of the layout, without dropout."""
    if config.model.reward_head:
        decoder = Decoder(config.model, weights, layout)
        score_BT = decoder.scores(decoder(batch["tokens"], batch["positions"], batch["segment_ids"]))
        return score_loss(config.objective, score_BT, batch, layout)[1]
    log_p_BT, *before = (
        log_probabilities(config, tree, batch, layout) for tree in (weights, reference) if tree is not None
    )
    return preference_loss(config.objective, log_p_BT, batch, layout, *before)[1]


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


def last_scores(score_BT: jax.Array, batch: Batch, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the score at the last position of each segment id from 1 to T, and whether there is one, [B, T] each.

    The score is 0 where there is none. The order of the positions does not matter.
    """
    num_ids, shared = score_BT.shape[1] + 1, tuple(layout.mesh_axes("time"))

    def find(score_BT: jax.Array, positions_BT: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_ids = lambda reduce, x_BT: jax.vmap(partial(reduce, num_segments=num_ids))(x_BT, ids_BT)
        # Float32 holds every position of a segment.
        last_BS = of_ids(jax.ops.segment_max, positions_BT.astype(jnp.float32))
        if shared:
            # On CPU devices, independent collectives may come in any order, and wait for each other. With the largest
            # scores next to the positions, this one comes after those of the forward pass.
            after_BS = of_ids(jax.ops.segment_max, jax.lax.stop_gradient(score_BT))
            last_BS = jax.lax.pmax(jnp.stack([last_BS, after_BS]), shared)[0]
        is_last_BT = positions_BT == jnp.take_along_axis(last_BS, ids_BT, axis=1)
        sums_BS = of_ids(jax.ops.segment_sum, jnp.where(is_last_BT, score_BT, 0.0))
        return jax.lax.psum(sums_BS, shared) if shared else sums_BS, last_BS >= 0

    if layout.rules:
        positions, sums = layout.spec("batch", "time"), layout.spec("batch", None)
        find = jax.shard_map(find, in_specs=(positions,) * 3, out_specs=(sums, sums))
    score_BS, exists_BS = find(score_BT, batch["positions"], batch["segment_ids"])
    return score_BS[:, 1:], exists_BS[:, 1:]


def pair_counts(batch: Batch) -> list[Any]:
    """Returns arrays [B, T] whose sums are the numbers of pairs, of trained tokens of answers, and of all tokens."""
    ids = batch["segment_ids"]
    begins = (ids % 2 == 1) & (batch["positions"] == 0)
    return [begins.astype(jnp.float32), batch["loss_weights"], (ids > 0).astype(jnp.float32)]
