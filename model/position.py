"""Floor 2, position: without it attention could not distinguish the order of the tokens.

- rope: each pair of a head's components is rotated by an angle proportional to the position, so that the product of a
  query and a key depends on their distance alone (Su et al. 2021, arXiv:2104.09864). Pairs are (i, i + C/2), as in
  Llama's published weights.
- sinusoidal: sines and cosines of the position are added to the embedding (Vaswani et al. 2017, section 3.5).
- learned: the position's row of a table is added (GPT-2, Radford et al. 2019).
- none: only the causal mask distinguishes positions (Kazemnejad et al. 2023, arXiv:2305.19466).
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.backend import platform
from model.config import ResolvedModelConfig, divisors
from model.cpu import computed_once
from model.embedding import embedding_lookup
from model.layers import Rope, full_rope, layer_kinds
from model.sharding import Layout

# Cosine and sine of every angle, each float32 [B, 1, T, C/2], or None where nothing is rotated.
Rotation = tuple[jax.Array, jax.Array] | None
# The rotation of each kind of layer, by its `rope`.
Rotations = dict[Rope | None, Rotation]


class Position(nnx.Module):
    """The positions' effect on the embedded tokens, and the rotation of queries and keys for all layers."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array] | None, layout: Layout):
        self.table = nnx.Param(weights["table"]) if weights else None
        self.config = config
        self.layout = layout

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Rotations]:
        """Returns the embedded tokens [B, T, D] with positions added, and the rotations."""
        rotations: Rotations = {None: None}
        match self.config.position:
            case "rope":
                for rope in sorted({kind.rope for kind in layer_kinds(self.config) if kind.rope}):
                    rotation = rope_rotation(self.config, positions_BT, rope)
                    rotations[rope] = jax.tree.map(computed_once, rotation) if platform() == "cpu" else rotation
            case "sinusoidal":
                added = sinusoids(positions_BT, x_BTD.shape[-1]).astype(x_BTD.dtype)
                x_BTD = x_BTD + self.layout.reshard(added, "batch", "sequence", None)
            case "learned":
                assert self.table is not None
                table = self.table[...].astype(x_BTD.dtype)
                x_BTD = x_BTD + embedding_lookup(table, positions_BT, self.layout)
        return x_BTD, rotations


def sinusoids(positions_BT: jax.Array, D: int) -> jax.Array:
    """Returns float32 [B, T, D]: component 2i is sin(position / 10000^(2i/D)), component 2i + 1 its cosine."""
    wavelengths = np.power(10_000.0, np.arange(0, D, 2) / D).astype(np.float32)
    angles = positions_BT[..., None].astype(jnp.float32) / wavelengths
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions_BT.shape, D)


def rope_rotation(
    config: ResolvedModelConfig, positions_BT: jax.Array, rope: Rope | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the rotation for these positions in layers with this `rope`, by default in those with full attention.

    YaRN also scales by a length above 1 (Peng et al. 2023, section 3.4), and longrope does.
    """
    rope = rope or full_rope(config)
    length = rotated_length(config) if rope.scaled else 1.0
    long = positions_BT.shape[1] > (config.rope_original_context or 0) if config.rope_long is None else config.rope_long
    angles = positions_BT[:, None, :, None].astype(jnp.float32) * frequencies(config, rope, long)
    return jnp.cos(angles) * length, jnp.sin(angles) * length


def rotated_length(config: ResolvedModelConfig) -> float:
    """Returns the length of a rotated vector of length 1 where rotations are scaled."""
    if config.rope_scaling not in ("yarn", "longrope"):
        return 1.0
    if config.rope_length is not None:
        return config.rope_length
    if config.rope_scaling == "yarn":
        return 0.1 * math.log(config.rope_factor) + 1
    assert config.rope_original_context is not None
    return math.sqrt(1 + math.log(config.rope_factor) / math.log(config.rope_original_context))


def frequencies(config: ResolvedModelConfig, rope: Rope | None = None, long: bool = False) -> np.ndarray:
    """Returns each pair's angle in radians per position, float32 [C/2]: base^(-2i/C), scaled for a longer context.

    C is here the number of components that are rotated.

    - linear: all are divided by the factor (Chen et al. 2023, arXiv:2306.15595).
    - llama3 (Llama Team 2024) and yarn (Peng et al. 2023, arXiv:2309.00071): pairs that turn more than `high_turns`
      times in the original context stay, those that turn less than `low_turns` times are divided, and those between
      are interpolated: in proportion to their turns (llama3), or to their index (yarn).
    - longrope (Ding et al. 2024, arXiv:2402.13753): each pair has its own divisor, and another one in long rows.
    """
    rope = rope or full_rope(config)
    C, factor = config.rope_dim, config.rope_factor
    plain = rope.base ** -(np.arange(0, C, 2) / C)
    if rope.scaled and config.rope_scaling == "longrope":
        by_pair = divisors((config.rope_long_divisors if long else config.rope_short_divisors) or "")
        return (plain / by_pair).astype(np.float32)
    if not rope.scaled:
        kept = np.ones(C // 2)
    elif config.rope_scaling == "linear":
        kept = np.zeros(C // 2)
    else:
        context, low, high = config.rope_original_context, config.rope_low_turns, config.rope_high_turns
        assert context is not None
        assert high is not None
        if config.rope_scaling == "llama3":
            kept = np.clip((context * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        else:
            # The (fractional) index of the pair that makes this number of turns.
            pair = lambda turns: C * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
            first, last = pair(high), pair(low)
            if config.rope_truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, C - 1)
            kept = 1 - np.clip((np.arange(C // 2) - first) / max(last - first, 0.001), 0, 1)
    return (plain * kept + plain / factor * (1 - kept)).astype(np.float32)


def rotate(x_BHTC: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates queries or keys [B, H, T, C] by their positions' angles, in float32; the dtype stays the same.

    Components behind those that have an angle stay as they are.
    """
    if rotation is None:
        return x_BHTC
    rotated = 2 * rotation[0].shape[-1]
    if rotated == x_BHTC.shape[-1]:
        return _rotate(x_BHTC, *rotation)
    first, rest = x_BHTC[..., :rotated], x_BHTC[..., rotated:]
    return jnp.concatenate([_rotate(first, *rotation), rest], axis=-1)


@jax.custom_vjp
def _rotate(x_BHTC: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    return _rotated(x_BHTC, cosine, sine, by_product=platform() == "tpu")


# A rotation's gradient is the gradient, rotated by the opposite angle.
_rotate.defvjp(
    lambda x_BHTC, cosine, sine: (_rotate(x_BHTC, cosine, sine), (cosine, sine)),
    lambda rotation, gradient: (
        _rotated(gradient, rotation[0], -rotation[1], by_product=platform() != "gpu"), None, None
    ),
)  # fmt: skip


def _rotated(x_BHTC: jax.Array, cosine: jax.Array, sine: jax.Array, by_product: bool) -> jax.Array:
    """Rotates x; its halves are swapped by a matrix product, exactly, or by moving them.

    The product suits a TPU, whose vector unit is slow to split heads, and on a CPU a gradient, which comes transposed.
    """
    C, f32 = x_BHTC.shape[-1], jnp.float32
    if by_product:
        swap_CC = jnp.asarray(np.roll(np.eye(C), C // 2, axis=1), x_BHTC.dtype)
        precision = jax.lax.Precision.HIGHEST if x_BHTC.dtype == f32 else None
        swapped = jnp.einsum("bhtc,cd->bhtd", x_BHTC, swap_CC, precision=precision, preferred_element_type=f32)
    else:
        swapped = jnp.roll(x_BHTC.astype(f32), C // 2, axis=-1)
    cosines, sines = jnp.concatenate([cosine, cosine], axis=-1), jnp.concatenate([-sine, sine], axis=-1)
    return (x_BHTC.astype(f32) * cosines + swapped * sines).astype(x_BHTC.dtype)
