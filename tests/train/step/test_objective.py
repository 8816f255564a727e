"""Losses of pairs of answers: the papers' formulas in PyTorch, the same on every mesh, and nothing else changes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from model.decoder import Decoder
from model.sharding import UNSHARDED
from model.trees import flattened
from tests import theirs
from tests.pairs import Batch, batch_of, pair_batch, random_pairs
from tests.peers import require
from tests.small import mesh_of, small_model, small_weights
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding, one_device_mesh
from train.devices.rules import training_layout
from train.planning.plan import argument_bytes
from train.step.objective import OF_PAIRS, OF_TOKENS, pair_figures, preference_loss, scores
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state
from train.step.step import make_train_step, skip_step, summed_loss

STEPS = 20
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.5},
    "conservative, by length": {"name": "dpo", "beta": 3.0, "label_smoothing": 0.2, "length_normalized": True},
    "simpo": {"name": "simpo", "beta": 2.5, "gamma": 0.7},
    "reward": {"name": "reward", "label_smoothing": 0.1},
}
ROWS, T = 2, 48
EXPERTS = small_model(num_layers=1, num_kv_heads=4, num_experts=4, expert_dim=16)


def config_for(objective: str, model: Any = None, **train: Any) -> Config:
    settings = {"learning_rate": 1e-3, "warmup_steps": 0, "clip_norm": 0.5, "final_fraction": 1.0, "weight_decay": 0.0}
    values = {"optimizer": settings, "train": {"num_steps": STEPS, "batch_size": ROWS, "init_from": "a@1", **train}}
    scores = objective == "reward"
    values |= {"objective": OBJECTIVES[objective], "data": {"segment_length": T}, "model": {"reward_head": scores}}
    model = model or small_model(num_layers=1, num_kv_heads=4, reward_head=scores, loss_chunk=None if scores else 64)
    return dataclasses.replace(make_config(values), model=model)


def torch_log_p(model: Any, batch: Batch) -> list[list[Any]]:
    """[chosen, rejected] of each pair, each answer alone in a row: log p of the trained tokens, or the score."""
    torch = require("torch")
    found: list[list[Any]] = []
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == number
            tokens, targets = (torch.tensor(batch[n][row][here][None], dtype=torch.long) for n in ("tokens", "targets"))
            if number % 2:
                found.append([])
            logits = model(tokens).logits
            if logits.shape == (1, 1):
                found[-1].append(logits[0].expand(int(batch["loss_weights"][row][here].sum())))
                continue
            log_p = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[0, :, 0]
            found[-1].append(log_p[torch.tensor(batch["loss_weights"][row][here] > 0)])
    return found


def torch_loss(objective: dict[str, Any], log_p: list[list[Any]], before: list[list[Any]]) -> tuple[Any, dict]:
    """The mean loss of a pair as the papers write it, and the metrics."""
    torch = require("torch")
    beta, epsilon = objective.get("beta"), objective.get("label_smoothing", 0)
    losses, figures, k2, tokens = [], [], 0.0, 0
    for policy, reference in zip(log_p, before, strict=True):
        r = []
        for of_policy, of_reference in zip(policy, reference, strict=True):
            k2, tokens = k2 + float(((of_policy - of_reference) ** 2).sum().detach()) / 2, tokens + len(of_policy)
            if objective["name"] == "reward":
                r.append(of_policy[0])
            elif objective["name"] == "simpo":
                r.append(beta / len(of_policy) * of_policy.sum())
            else:
                n = len(of_policy) if objective.get("length_normalized") else 1
                r.append(beta * (of_policy.sum() - of_reference.sum()) / n)
        z = r[0] - r[1] - objective.get("gamma", 0)
        losses.append(-(1 - epsilon) * torch.log(torch.sigmoid(z)) - epsilon * torch.log(1 - torch.sigmoid(z)))
        r_w, r_l = (float(reward.detach()) for reward in r)
        figures.append([float(losses[-1].detach()), float(r_w > r_l), r_w - r_l, r_w, r_l])
    means = dict(zip(OF_PAIRS, np.mean(figures, axis=0).tolist(), strict=True))
    if objective["name"] == "dpo":
        means["kl"] = k2 / tokens
    return torch.stack(losses).mean(), means | {"loss_weight": len(losses), "answer_tokens": tokens}


def state_at(config: Config, weights: dict, reference: dict | None) -> dict:
    state = {"step": np.int32(0), "weights": weights, "optimizer": jax.jit(make_optimizer(config).init)(weights)}
    return state | ({"reference": reference} if config.objective.uses_reference else {})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_twenty_steps_follow_the_formulas_in_torch_and_so_does_every_gradient(objective: str):
    torch, name = require("torch"), "reward" if objective == "reward" else "llama"
    config = config_for(objective, theirs.ALL[name])
    weights, reference = small_weights(config.model), small_weights(config.model, seed=1)
    frozen, _ = theirs.load(name, reference)
    model, parameters = theirs.load(name, weights)
    batches = [pair_batch(ROWS, T, seed) for seed in range(2)]
    with torch.no_grad():
        before = [torch_log_p(frozen, batch) for batch in batches]

    loss, figures = torch_loss(OBJECTIVES[objective], torch_log_p(model, batches[0]), before[0])
    loss.backward()
    with jax.set_mesh(one_device_mesh()):
        of_batch = functools.partial(summed_loss, config, batch=batches[0], reference=reference)
        if not config.objective.uses_reference:
            of_batch = functools.partial(summed_loss, config, batch=batches[0])
        (value, _), gradients = jax.jit(jax.value_and_grad(of_batch, has_aux=True))(weights)
    pairs = figures["loss_weight"]
    assert float(value) / pairs == pytest.approx(loss.item(), rel=1e-4)
    found = theirs.tensors(name, gradients)
    whole = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values()))
    for key, parameter in parameters.items():
        difference = np.linalg.norm(found[key] / pairs - parameter.grad.numpy())
        assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-7 * whole, key

    adamw = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        adamw.zero_grad()
        loss, figures = torch_loss(OBJECTIVES[objective], torch_log_p(model, batches[step % 2]), before[step % 2])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
        adamw.step()
        expected.append(figures | {"grad_norm": float(norm)})
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
    with jax.set_mesh(one_device_mesh()):
        train_step, state = make_train_step(config, make_optimizer(config)), state_at(config, weights, reference)
        for step in range(STEPS):
            state, metrics = train_step(state, batches[step % 2])
            assert metrics.keys() == expected[step].keys() | {"learning_rate"}
            for name, value in expected[step].items():
                within = {"rel": 2e-3, "abs": 1e-4} if name == "grad_norm" else {"abs": 1e-4, "rel": 1e-4}
                assert float(metrics[name]) == pytest.approx(value, **within), (step, name)


@functools.cache
def steps_of(case: str, parts: int = 1, **shape: int) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The metrics of two steps on a mesh, and the first gradients, from the same weights and reference."""
    config = config_for(*(("dpo", EXPERTS) if case == "experts" else (case,)), batch_size=8, accumulation_steps=parts)
    with jax.set_mesh(mesh_of(**shape)):
        optimizer = make_optimizer(config)
        made = state_at(config, small_weights(config.model), small_weights(config.model, seed=1))
        shapes = abstract_state(config, optimizer)
        state = jax.tree.map(lambda x, shape: jax.device_put(np.asarray(x), shape.sharding), made, shapes)
        before = jax.device_get(state.get("reference"))
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
        step, metrics, gradients = make_train_step(config, optimizer), [], {}
        for seed in range(2):
            state, found = step(state, jax.device_put(pair_batch(8, T, seed), sharding))
            metrics.append({name: float(value) for name, value in found.items()})
            gradients = gradients or flattened(jax.device_get(state["optimizer"]["adam"].mu))
        # No step changes the reference.
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.get("reference")), before)
        return metrics, gradients


MESHES = [
    ("conservative, by length", 4, {}),
    ("conservative, by length", 2, {"fsdp": 2, "context": 2}),
    ("conservative, by length", 1, {"data": 2, "fsdp": 2}),
    ("conservative, by length", 1, {"slices": 2, "context": 2, "tensor": 2}),
    ("simpo", 1, {"tensor": 4}),
    ("reward", 4, {"data": 2, "context": 2}),
    ("reward", 1, {"slices": 2, "context": 2, "tensor": 2}),
    ("experts", 2, {"fsdp": 2, "expert": 2}),
]


@pytest.mark.parametrize(("case", "parts", "shape"), MESHES, ids=str)
def test_meshes_and_accumulation_change_no_figure(case: str, parts: int, shape: dict[str, int]):
    (found, gradients), (expected, of_one) = steps_of(case, parts, **shape), steps_of(case)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-6)
    assert found[0]["loss_weight"] == 12
    for name, x in of_one.items():
        assert np.linalg.norm(gradients[name] - x) <= 1e-5 * np.linalg.norm(x), name


def sums_alone(config: Config, weights: dict, reference: dict, batch: Batch) -> dict[str, float]:
    with jax.set_mesh(one_device_mesh()):
        _, sums = jax.jit(functools.partial(summed_loss, config, reference=reference))(weights, batch)
        return {name: float(x) for name, x in sums.items()}


def test_a_pair_has_the_same_figures_packed_and_alone():
    config, pairs = config_for("dpo"), random_pairs(5, seed=3)
    weights, reference = small_weights(config.model), small_weights(config.model, seed=1)
    packed = sums_alone(config, weights, reference, batch_of(pairs, 5))
    alone = [sums_alone(config, weights, reference, batch_of([pair], 5)) for pair in pairs]
    assert packed == pytest.approx({name: sum(one[name] for one in alone) for name in packed}, rel=1e-5)
    assert len({one["margin"] for one in alone}) == 5
    # Exchanged answers exchange the rewards.
    turned = [pair.rejected._replace(rejected=pair._replace(rejected=None)) for pair in pairs]
    exchanged = sums_alone(config, weights, reference, batch_of(turned, 5))
    assert exchanged["chosen_reward"] == pytest.approx(packed["rejected_reward"], rel=1e-5)
    assert exchanged["margin"] == pytest.approx(-packed["margin"], rel=1e-5)


def test_scores_are_those_of_the_last_input_of_each_sequence_on_every_mesh():
    config, batch = config_for("reward", batch_size=8), pair_batch(8, T)
    weights = small_weights(config.model)
    with jax.set_mesh(one_device_mesh()):
        decoder = Decoder(config.model, weights)
        of_all = decoder.scores(decoder(*(batch[name] for name in ("tokens", "positions", "segment_ids"))))
    expected = np.zeros((8, T), np.float32)
    for row, ids in enumerate(batch["segment_ids"]):
        for number in range(1, ids.max() + 1):
            expected[row, number - 1] = of_all[row, np.flatnonzero(ids == number)[-1]]
    assert np.count_nonzero(expected) == 24
    for shape in ({}, {"fsdp": 2, "context": 2}):
        with jax.set_mesh(mesh_of(**shape)):
            sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
            shapes = abstract_state(config, make_optimizer(config))["weights"]
            placed = jax.tree.map(lambda x, shape: jax.device_put(np.asarray(x), shape.sharding), weights, shapes)
            found = jax.jit(functools.partial(scores, config))(placed, jax.device_put(batch, sharding))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_begins_at_its_reference_and_a_skipped_step_keeps_it():
    config = config_for("dpo")
    with jax.set_mesh(one_device_mesh()):
        weights, same = small_weights(config.model), small_weights(config.model)
        evaluated = jax.jit(functools.partial(pair_figures, config, layout=UNSHARDED))(weights, same, pair_batch(ROWS))
        assert {name: float(evaluated[name]) for name in ("margin", "kl")} == {"margin": 0, "kl": 0}
        state, metrics = make_train_step(config, make_optimizer(config))(
            state_at(config, weights, same), pair_batch(ROWS)
        )
    assert {name: float(metrics[name]) for name in ("margin", "chosen_reward", "accuracy", *OF_TOKENS)} == {
        "margin": 0, "chosen_reward": 0, "accuracy": 0, "kl": 0
    }  # fmt: skip
    assert float(metrics["loss"]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(metrics["grad_norm"]) > 0.01
    after, _ = skip_step(config, state)
    assert after["reference"] is state["reference"]


def test_the_sums_of_answers_take_no_memory_for_each_pair_and_position():
    batch = {"segment_ids": np.zeros((2, 512), np.int32), "loss_weights": np.ones((2, 512), np.float32)}
    log_p_BT = np.zeros((2, 512), np.float32)
    loss = functools.partial(preference_loss, config_for("dpo").objective, batch=batch, layout=UNSHARDED)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(log_p_BT, reference_BT=log_p_BT).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * log_p_BT.nbytes


def test_a_plan_counts_the_reference():
    mesh = mesh_of(fsdp=4)
    sizes = {name: argument_bytes(config_for(name, batch_size=8).resolved(), mesh) for name in ("dpo", "simpo")}
    assert sizes["dpo"] == sizes["simpo"] | {"reference": sizes["dpo"]["weights"]}
