"""Build a small decoder and train it by hand: a loss, its gradients, and plain gradient descent.

python examples/gradient_step.py
"""

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.decoder import Decoder
from model.loss import summed_losses
from model.parameters import count_parameters, initial_weights

# The task is to count: each row goes 0, 1, 2, ... from a random start, modulo the size of the vocabulary.
B, T, V = 16, 32, 100
config = ModelConfig(num_layers=2, model_dim=64, num_heads=4, vocab_size=V, compute_dtype="float32").resolved(V, T)
weights = jax.jit(lambda: initial_weights(config, seed=0))()
print(f"{count_parameters(config):,} parameters")


def mean_loss(weights: dict, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the cross-entropy in nats a token."""
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    one_document_BT = jnp.ones((B, T), jnp.int32)
    decoder = Decoder(config, weights)
    x_BTD = decoder(tokens_BT, positions_BT, one_document_BT)
    every_token_counts_BT = jnp.ones((B, T))
    losses = summed_losses(x_BTD, decoder.unembedding_matrix(), targets_BT, every_token_counts_BT, config)
    return losses.objective / (B * T)


@jax.jit
def step(weights: dict, key: jax.Array) -> tuple[dict, jax.Array]:
    """Draws a batch and moves all weights against their gradients."""
    start_B = jax.random.randint(key, (B, 1), 0, V)
    numbers_BT = (start_B + jnp.arange(T + 1)) % V
    loss, gradients = jax.value_and_grad(mean_loss)(weights, numbers_BT[:, :-1], numbers_BT[:, 1:])
    return jax.tree.map(lambda w, g: w - 0.5 * g, weights, gradients), loss


for i in range(101):
    weights, loss = step(weights, jax.random.key(i))
    if i % 20 == 0:
        print(f"step {i:3}  loss {loss:.3f}")
