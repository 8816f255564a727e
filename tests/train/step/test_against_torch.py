"""The same model, weights and data in PyTorch (Transformers): loss, every gradient, and twenty optimizer steps."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests import theirs
from tests.peers import require
from tests.small import small_batch, small_weights
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.step.optimizer import make_optimizer
from train.step.step import make_train_step, summed_loss

STEPS = 20


def whole_rows(seed: int) -> dict[str, np.ndarray]:
    """A batch with one document a row: what a model that knows no packing can read."""
    batch = small_batch(4, 16, seed, padding=False)
    rows = {"segment_ids": np.ones((4, 16), np.int32), "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1))}
    return batch | rows


def torch_loss(model, batch: dict[str, np.ndarray]):
    torch = require("torch")
    logits = model(torch.tensor(batch["tokens"], dtype=torch.long)).logits
    targets = torch.tensor(batch["targets"], dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", theirs.MODELS)
def test_the_loss_and_every_gradient_are_those_of_transformers(name: str):
    require("torch")
    config = dataclasses.replace(make_config({}), model=theirs.MODELS[name])
    weights, batch = small_weights(config.model), whole_rows(0)
    model, parameters = theirs.load(name, weights)
    expected = torch_loss(model, batch)
    expected.backward()

    with jax.set_mesh(one_device_mesh()):
        gradient = jax.jit(jax.value_and_grad(lambda weights: summed_loss(config, weights, batch)[0] / 64))
        loss, gradients = gradient(weights)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    found = theirs.tensors(name, gradients)
    whole = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters.values()))
    assert whole > 0.1
    for key, parameter in parameters.items():
        difference = np.linalg.norm(found[key] - parameter.grad.numpy())
        # Some are zero by nature (a bias of keys shifts all scores alike): there only rounding is left.
        assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-7 * whole, key


# The others have the parameters of these two, but for some biases and norms.
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_twenty_steps_follow_torchs_adamw_with_clipping_decay_mask_and_schedule(name: str):
    torch = require("torch")
    settings = {"learning_rate": 3e-3, "warmup_steps": 4, "clip_norm": 0.5, "weight_decay": 0.2, "final_fraction": 0.1}
    config = make_config({"optimizer": settings, "train": {"num_steps": STEPS, "batch_size": 4}})
    config = dataclasses.replace(config, model=theirs.MODELS[name])
    weights = small_weights(config.model)
    model, parameters = theirs.load(name, weights)
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.2},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)

    def rate(step: int) -> float:
        if step < 4:
            return (step + 1) / 5
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 5))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    expected, norms = [], []
    for step in range(STEPS):
        adamw.zero_grad()
        loss = torch_loss(model, whole_rows(step % 3))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        adamw.step()
        schedule.step()
        expected.append(loss.item())

    found = []
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state = {"step": np.int32(0), "weights": weights, "optimizer": jax.jit(optimizer.init)(weights)}
        train_step = make_train_step(config, optimizer)
        for step in range(STEPS):
            state, metrics = train_step(state, whole_rows(step % 3))
            found.append(float(metrics["loss"]))
            assert float(metrics["grad_norm"]) == pytest.approx(norms[step], rel=2e-3)
    # Clipping acts, and something is learned.
    assert max(norms) > 0.5
    assert expected[-1] < expected[0] - 0.2
    np.testing.assert_allclose(found, expected, atol=1e-4)
