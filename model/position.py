"""Floor 2, position: rotary embedding (RoPE; Su et al. 2021, arXiv:2104.09864).

Each pair of a head's components is turned by an angle proportional to the position, so that the product of a query
and a key depends on their distance alone. Pairs are (i, i + C/2), as in Llama's published weights.
"""

import jax
import jax.numpy as jnp

from model.config import ModelConfig

Rotation = tuple[jax.Array, jax.Array]


def rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    """Cosine and sine of every angle, each float32 [B, 1, T, C/2]; made once, used by all layers."""
    assert config.head_dim is not None
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_base**-exponents
    angles = positions_BT[:, None, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BHTC: jax.Array, by: Rotation) -> jax.Array:
    """Turn queries or keys [B, H, T, C] by their positions' angles, in float32; the dtype stays."""
    cosine, sine = by
    half = x_BHTC.shape[-1] // 2
    first, second = x_BHTC[..., :half].astype(jnp.float32), x_BHTC[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BHTC.dtype)
