"""NorMuon (Li et al. 2025, arXiv:2510.05491): the orthogonalized updates of all neurons get the same size."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.parameters import Parameter
from model.trees import flattened, nested
from train.step.state import Weights

# Added to the root of the mean square, as in the authors' code.
EPSILON = 1e-10


class NeuronState(NamedTuple):
    """Running means of the squared update over a neuron's inputs: the parameters' shapes, with 1 for fan-in axes."""

    squares: Weights


def normalize_neurons(table: Mapping[str, Parameter], decay: float) -> optax.GradientTransformation:
    """Divides each neuron's update by the root of its running mean square; a matrix keeps its Frobenius norm.

    A neuron is one element of the fan-out axes of the parameter table. Every matrix, of a layer and an expert, has its
    own norm.
    """

    def inputs(name: str) -> list[int]:
        return [i for i, axis in enumerate(table[name].axes) if axis in table[name].fan_in]

    def norm(x: jax.Array, p: Parameter) -> jax.Array:
        of_matrix = [i for i, axis in enumerate(p.axes) if axis in (*p.fan_in, *p.fan_out)]
        return jnp.sqrt(jnp.sum(jnp.square(x), of_matrix, keepdims=True))

    def means(tree: Weights) -> dict[str, jax.Array]:
        return {name: jnp.mean(jnp.square(x), inputs(name), keepdims=True) for name, x in flattened(tree).items()}

    def init(weights: Weights) -> NeuronState:
        return NeuronState(nested(jax.tree.map(jnp.zeros_like, means(weights))))

    def update(updates: Weights, state: NeuronState, _: Weights | None = None) -> tuple[Weights, NeuronState]:
        old, new = flattened(state.squares), means(updates)
        squares = {name: decay * old[name] + (1 - decay) * new[name] for name in new}
        normalized = {}
        for name, x in flattened(updates).items():
            scaled = x / (jnp.sqrt(squares[name]) + EPSILON)
            normalized[name] = scaled * (norm(x, table[name]) / (norm(scaled, table[name]) + EPSILON))
        return nested(normalized), NeuronState(nested(squares))

    return optax.GradientTransformation(init, update)
