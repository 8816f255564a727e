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


def with_experts(
    config: ModelConfig, weights: dict[str, Any], num_experts: int, experts_per_token: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the config and the weights of a mixture that computes what a dense model does.

    InputError where the model has experts, or a feed-forward that experts cannot have.
    """
    if config.num_experts is not None:
        raise InputError(
            f"--experts={num_experts}: these weights have {config.num_experts} experts; give a dense model"
        )
    config = dataclasses.replace(config, num_experts=num_experts, experts_per_token=experts_per_token, export_as=None)
    if problems := config.problems():
        raise InputError("\n".join(problems))
    flat = flattened(weights)
    copies = {
        "blocks.experts.gate_up": np.stack([flat.pop(GATE), flat.pop(UP)], axis=2),
        "blocks.experts.down": flat.pop(DOWN),
    }
    if config.feedforward_bias:
        both = [flat.pop(f"{name}_bias") for name in (GATE, UP)]
        copies["blocks.experts.gate_up_bias"] = np.stack(both, axis=1)
        copies["blocks.experts.down_bias"] = flat.pop(f"{DOWN}_bias")
    flat |= {name: np.repeat(array[:, None], num_experts, axis=1) for name, array in copies.items()}
    router = "blocks.experts.router"
    flat[router] = np.asarray(initial_value(router, parameter_table(config.resolved())[router], SEED))
    return config, nested(flat)
