"""The golden run: ten steps whose losses a refactor must reproduce.

Regenerate after a change that is meant to change them, and say so in the commit:

    python -m tests.train.test_golden
"""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from tests.small import small_batch, small_model
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.step.optimizer import make_optimizer
from train.step.state import make_state
from train.step.step import make_train_step

FILE = Path(__file__).parent / "golden.json"


def golden_run() -> list[dict[str, float]]:
    """Metrics of ten steps at a fixed seed."""
    train = {"batch_size": 8, "num_steps": 10, "accumulation_steps": 2}
    config = make_config({"train": train, "optimizer": {"learning_rate": 1e-2}})
    config = dataclasses.replace(config, model=small_model(remat_policy="products"))
    with jax.set_mesh(one_device_mesh()):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        metrics = []
        for seed in range(10):
            state, found = step(state, small_batch(seed=seed % 3))
            metrics.append({name: float(value) for name, value in sorted(found.items())})
        return metrics


def test_ten_steps_have_the_losses_that_they_had():
    for found, expected in zip(golden_run(), json.loads(FILE.read_text()), strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden_run(), indent=1) + "\n")
