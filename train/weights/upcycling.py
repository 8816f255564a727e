"""Upcycling: a mixture of experts begins with copies of a dense model's feed-forwards (Komatsuzaki et al. 2022).

(arXiv:2212.05055.) The router's weights of a token sum to 1, so the mixture begins with the dense model's loss.
"""

import dataclasses
from typing import Any

import numpy as np

from data.errors import InputError
from model.config import ModelConfig
from model.parameters import initial_value, parameter_table
from model.trees import flattened, nested

# By its name a parameter's initial values follow from the seed.
SEED = 0
GATE, UP, DOWN = (f"blocks.feedforward.{name}" for name in ("gate", "up", "down"))


def mixture_config(config: ModelConfig, num_experts: int, experts_per_token: int) -> ModelConfig:
    """Returns the config of the mixture. InputError where the model has experts, or no gate, which experts have."""
    given = f"--experts={num_experts}"
    if config.num_experts is not None:
        raise InputError(f"{given}: these weights have {config.num_experts} experts already; give a dense model")
    if not config.gated:
        raise InputError(f"{given}: experts are gated, and the feed-forward of these weights is not")
    config = dataclasses.replace(config, num_experts=num_experts, experts_per_token=experts_per_token, export_as=None)
    if problems := config.problems():
        raise InputError("\n".join(problems))
    return config


def mixture_weights(config: ModelConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """Returns weights with which the mixture computes what a dense model's weights do."""
    assert config.num_experts
    flat = flattened(weights)
    copies = {
        "blocks.experts.gate_up": np.stack([flat.pop(GATE), flat.pop(UP)], axis=2),
        "blocks.experts.down": flat.pop(DOWN),
    }
    if config.feedforward_bias:
        both = [flat.pop(f"{name}_bias") for name in (GATE, UP)]
        copies["blocks.experts.gate_up_bias"] = np.stack(both, axis=1)
        copies["blocks.experts.down_bias"] = flat.pop(f"{DOWN}_bias")
    flat |= {name: np.repeat(array[:, None], config.num_experts, axis=1) for name, array in copies.items()}
    router = "blocks.experts.router"
    flat[router] = np.asarray(initial_value(router, parameter_table(config.resolved())[router], SEED))
    return nested(flat)
