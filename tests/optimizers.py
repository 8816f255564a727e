"""The small model under each optimizer: configs, random gradients, and the weights after updates by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from model.parameters import parameter_table
from model.trees import flattened, nested
from tests import peers
from tests.small import mesh_of, small_model
from train.config.config import Config
from train.config.reading import make_config
from train.devices.rules import TRAINING
from train.step.optimizer import make_optimizer

# A rate at which each learns the small model.
RATES = {"adamw": 1e-2, "lion": 2e-3, "adafactor": 5e-2, "muon": 1e-2}
RATES |= {"normuon": 1e-2, "soap": 1e-2, "soap_muon": 1e-2}
STEPS, DECAY = 4, 0.5
# A layer with a dense feed-forward, and one with experts.
EXPERTS = {"num_experts": 4, "expert_dim": 24, "dense_layers": 1, "balance_bias": True}


def config_for(name: str, **changes: object) -> Config:
    """Without clipping; linear from the first update on to a tenth at update 99."""
    values = {"name": name, "learning_rate": RATES[name], "schedule": "linear", "warmup_steps": 0, "clip_norm": 0.0}
    config = make_config({"train": {"batch_size": 8, "num_steps": 100}, "optimizer": values | changes})
    return dataclasses.replace(config, model=small_model(num_kv_heads=4))


def random_trees(config: Config) -> list[dict[str, np.ndarray]]:
    """Weights, and then gradients for STEPS updates, by name."""
    random = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in parameter_table(config.model).items()}
    return [
        {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(1 + STEPS)
    ]


def updated_on(config: Config, shape: dict[str, int] | None = None, trees: list | None = None) -> dict[str, np.ndarray]:
    """The weights of `random_trees`, or of others, after an update by each of its gradients, on a mesh."""
    table = parameter_table(config.model)
    with jax.set_mesh(mesh_of(**shape or {})):
        weights, *gradients = (
            nested({name: jax.device_put(x, TRAINING.spec(*table[name].axes)) for name, x in tree.items()})
            for tree in trees or random_trees(config)
        )
        optimizer = make_optimizer(config)
        state = jax.jit(optimizer.init)(weights)
        before = shardings(state)

        @jax.jit
        def step(gradients, state, weights):
            updates, state = optimizer.update(gradients, state, weights)
            return jax.tree.map(jnp.add, weights, updates), state

        for gradient in gradients:
            weights, state = step(gradient, state, weights)
        assert shardings(state) == before
        return flattened(jax.device_get(weights))


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
        assert error < tolerance, (name, error)


# Rows and columns of the small model's matrices, all layers alike; the others are vectors.
MATRICES = {"query": (32, 32), "key": (32, 32), "value": (32, 32), "output": (32, 32)}
MATRICES |= {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
TABLES = {"embedding.table": (384, 32), "unembedding.matrix": (32, 384)}


def in_layers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Single matrices and vectors, by name and layer."""
    found = {}
    for name, array in arrays.items():
        last = name.split(".")[-1]
        shape = TABLES.get(name) or MATRICES.get(last) or (32,)
        found |= {f"{name} {layer}": x for layer, x in enumerate(array.reshape(-1, *shape))}
    return found


def is_matrix(name: str) -> bool:
    return name.split()[0].split(".")[-1] in MATRICES


def by_torch(config: Config, make) -> dict[str, np.ndarray]:
    """The same updates, layer by layer, by the PyTorch optimizers that `make(named parameters)` gives."""
    torch = peers.require("torch")
    before, *gradients = (in_layers(tree) for tree in random_trees(config))
    weights = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in before.items()}
    optimizers = make(weights)
    for step, gradient in enumerate(gradients):
        for name, x in gradient.items():
            weights[name].grad = torch.tensor(x)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(config, step)
            optimizer.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}


def rate(config: Config, step: int) -> float:
    return config.optimizer.learning_rate * (1 - 0.9 * step / 99)
