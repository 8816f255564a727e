"""The loss of sampled answers: the paper's formula in PyTorch, several updates with a batch, and every mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from model.trees import flattened
from tests import theirs
from tests.peers import require
from tests.small import VOCAB_SIZE, mesh_of, small_model, small_weights
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding, one_device_mesh
from train.devices.rules import training_layout
from train.step.optimizer import make_optimizer
from train.step.step import make_train_step, summed_loss

STEPS, ROWS, T = 20, 4, 24
OBJECTIVES: dict[str, dict[str, Any]] = {
    "by token": {"kl_weight": 0.1, "clip": 0.1, "updates": 2},
    "by answer": {"kl_weight": 0.0, "clip": 0.2, "updates": 3, "length_normalized": True},
    "one update": {"kl_weight": 0.5},
}
Batch = dict[str, np.ndarray]


def config_for(objective: str, model: Any = None, **train: Any) -> Config:
    settings = {"learning_rate": 3e-3, "warmup_steps": 0, "clip_norm": 0.5, "final_fraction": 0.1, "weight_decay": 0.0}
    values: dict[str, Any] = {"optimizer": settings, "train": {"num_steps": STEPS, "batch_size": ROWS, **train}}
    values["train"]["init_from"] = "a@1"
    values["objective"] = {"name": "grpo", "reward": "a.py:b", "group_size": 2, "max_new_tokens": 8}
    values["objective"] |= OBJECTIVES[objective]
    values["data"] = {"segment_length": T, "segmentation": "document"}
    return dataclasses.replace(make_config(values), model=model or small_model(num_layers=1, num_kv_heads=4))


def answer_batch(config: Config, rows: int = ROWS, seed: int = 0) -> Batch:
    """Rows of a prompt and an answer of random tokens, and an empty row; advantages have both signs."""
    random = np.random.default_rng(seed)
    batch: Batch = {n: np.zeros((rows, T), np.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    batch |= {n: np.zeros((rows, T), np.float32) for n in ("loss_weights", "advantages")}
    for row in range(rows - 1):
        prompt, answer = random.integers(1, T // 2, 2)
        ids = random.integers(1, VOCAB_SIZE, prompt + answer)
        n, answered = len(ids) - 1, slice(prompt - 1, len(ids) - 1)
        batch["tokens"][row, :n], batch["targets"][row, :n] = ids[:-1], ids[1:]
        batch["positions"][row, :n], batch["segment_ids"][row, :n] = np.arange(n), 1
        batch["loss_weights"][row, answered] = 1 / answer if config.objective.length_normalized else 1
        batch["advantages"][row, answered] = random.normal() + (-1) ** row
    return batch


def torch_log_p(model: Any, batch: Batch) -> list[Any]:
    """Log p of the tokens of each answer, each in a batch of its own."""
    torch = require("torch")
    found = []
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["loss_weights"], strict=True):
        if weights.any():
            ids = torch.tensor(tokens[None], dtype=torch.long)
            log_p = torch.log_softmax(model(ids).logits, -1)[0].gather(-1, torch.tensor(targets[:, None]).long())[:, 0]
            found.append(log_p[torch.tensor(weights > 0)])
    return found


def torch_loss(config: Config, log_p: list[Any], old: list[Any], before: list[Any], batch: Batch) -> tuple[Any, dict]:
    """The loss as the paper writes it, the mean over answers or over all tokens, and the other figures."""
    torch, c = require("torch"), config.objective
    advantages = [row[w > 0][0] for row, w in zip(batch["advantages"], batch["loss_weights"], strict=True) if w.any()]
    losses, figures = [], []
    for now, then, reference, advantage in zip(log_p, old, before, advantages, strict=True):
        ratio = torch.exp(now - then)
        clipped = torch.clamp(ratio, 1 - c.clip, 1 + c.clip)
        gain = torch.minimum(ratio * float(advantage), clipped * float(advantage))
        kl = torch.exp(reference - now) - (reference - now) - 1
        losses.append(-gain + c.kl_weight * kl)
        figures.append([-now, (clipped * float(advantage) < ratio * float(advantage)).float(), kl])
    mean = (
        (lambda x: torch.stack([of.mean() for of in x]).mean())
        if c.length_normalized
        else (lambda x: torch.cat(x).mean())
    )
    names = ("entropy", "clipped", "kl") if c.kl_weight else ("entropy", "clipped")
    found = {name: float(mean([f[i].detach() for f in figures])) for i, name in enumerate(names)}
    return mean(losses), found


def state_at(config: Config, weights: dict, reference: dict) -> dict:
    state = {"step": np.int32(0), "weights": weights, "optimizer": jax.jit(make_optimizer(config).init)(weights)}
    return state | ({"reference": reference} if config.objective.uses_reference else {})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_twenty_steps_follow_the_paper_in_torch_and_so_does_every_gradient(objective: str):
    torch, config = require("torch"), config_for(objective, theirs.MODELS["llama"])
    weights, reference = small_weights(config.model), small_weights(config.model, seed=1)
    frozen, _ = theirs.load("llama", reference)
    model, parameters = theirs.load("llama", weights)
    batches = [answer_batch(config, seed=seed) for seed in range(2)]
    with torch.no_grad():
        before = [torch_log_p(frozen, batch) for batch in batches]
        # Other weights than those of the answers, so that some ratios are cut off.
        old = [[x + 0.3 * torch.sin(100 * x) for x in torch_log_p(model, batches[0])]]

    loss, figures = torch_loss(config, torch_log_p(model, batches[0]), old[0], before[0], batches[0])
    loss.backward()
    with_old = batches[0] | {"old_log_p": np.zeros((ROWS, T), np.float32)}
    with_old["old_log_p"][batches[0]["loss_weights"] > 0] = torch.cat(old[0]).numpy()
    with jax.set_mesh(one_device_mesh()):
        given = {"reference": reference} if config.objective.uses_reference else {}
        of_batch = functools.partial(summed_loss, config, batch=with_old, **given)
        (value, sums), gradients = jax.jit(jax.value_and_grad(of_batch, has_aux=True))(weights)
    weight = batches[0]["loss_weights"].sum()
    assert float(value) / weight == pytest.approx(loss.item(), rel=1e-4)
    assert 0 < figures["clipped"] < 1
    assert {name: float(sums[name]) / weight for name in figures} == pytest.approx(figures, rel=1e-4)
    found = theirs.tensors("llama", gradients)
    whole = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values()))
    for key, parameter in parameters.items():
        difference = np.linalg.norm(found[key] / weight - parameter.grad.numpy())
        assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-7 * whole, key

    adamw = torch.optim.AdamW(parameters.values(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with jax.set_mesh(one_device_mesh()):
        train_step, state = make_train_step(config, make_optimizer(config)), state_at(config, weights, reference)
        for step in range(STEPS):
            batch, expected = batches[step % 2], []
            state, metrics = train_step(state, batch)
            with torch.no_grad():
                then = torch_log_p(model, batch)
            for _ in range(config.objective.updates):
                adamw.zero_grad()
                loss, figures = torch_loss(config, torch_log_p(model, batch), then, before[step % 2], batch)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)
                # All updates of a step have its rate.
                adamw.param_groups[0]["lr"] = float(metrics["learning_rate"])
                adamw.step()
                expected.append(figures | {"loss": loss.item(), "grad_norm": float(norm)})
            means = {name: np.mean([of[name] for of in expected]) for name in expected[0]}
            assert metrics.keys() == means.keys() | {"learning_rate", "loss_weight"}
            for name, value in means.items():
                within = {"rel": 2e-3, "abs": 1e-4} if name == "grad_norm" else {"abs": 1e-4, "rel": 1e-4}
                assert float(metrics[name]) == pytest.approx(value, **within), (step, name)
    assert int(state["step"]) == STEPS
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4)


@functools.cache
def step_of(objective: str, parts: int = 1, **shape: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of a step on a mesh, and the weights after it, with half of the tokens in one row."""
    config = config_for(objective, batch_size=8, accumulation_steps=parts)
    with jax.set_mesh(mesh_of(**shape)):
        made = state_at(config, small_weights(config.model), small_weights(config.model, seed=1))
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
        batch = jax.device_put(answer_batch(config, 8), sharding)
        state, metrics = make_train_step(config, make_optimizer(config))(made, batch)
        return {name: float(x) for name, x in metrics.items()}, jax.device_get(flattened(state["weights"]))


@pytest.mark.parametrize(
    "mesh",
    [{"parts": 2}, {"data": 2, "fsdp": 2}, {"context": 2, "tensor": 2}, {"parts": 2, "context": 2, "fsdp": 2}],
    ids=str,
)
def test_meshes_and_accumulation_change_no_figure(mesh: dict[str, int]):
    for objective in ("by token",):
        metrics, weights = step_of(objective)
        on_mesh, theirs_ = step_of(objective, **mesh)
        assert metrics["clipped"] > 0
        assert on_mesh == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, x in weights.items():
            np.testing.assert_allclose(theirs_[name], x, rtol=1e-3, atol=2e-5, err_msg=name)
