"""The parametrization under which the best learning rate does not depend on the size (`model.parametrization` = mup).

The base model is this model with every width times `base_dim`/`model_dim` (numbers of heads, feed-forwards and experts
are widths; the width of a head, a single key/value head and the number of experts stay) and with `base_layers` layers.
The given settings hold there. With r = `model_dim`/`base_dim` and a = `base_layers`/`num_layers`, the factors are:

                              initial values    rate of AdamW, Lion    rate of Muon    epsilon
    embedding, positions      1                 1                      -               1/r
    norms, biases             1                 1                      -               a/r, after the blocks 1/r
    matrices                  1                 1/r                    1/√r            a/r
    routers                   1/√r              1/r                    -               a
    unembedding               1/√r              1/r                    -               1
    the end of a branch       a times           a times                a times         1/a times

- Width with AdamW: Yang et al. 2022 (Tensor Programs V, arXiv:2203.03466), table 3, in which initial values and rates
  stand for all multipliers. Deviations of 1/√fan_in, which all matrices have, already shrink by 1/√r. A router has few
  outputs, whatever the width, as an unembedding has. Lion's updates are elements of one size, as Adam's are.
- Width with Muon: the spectral norm of an update is to grow as √(out/in), here as 1 (Yang, Simon and Bernstein 2023,
  arXiv:2310.17813; Bernstein and Newhouse 2024, arXiv:2409.20325). Ours grows as √max(in, out), so as √r. Keys and
  values of a single head keep their width, so there it is to fall as 1/√r, and the factor is 1/r.
- Depth: each branch has the factor a (CompleteP, Dey et al. 2025, arXiv:2505.01618; for Muon Qiu et al. 2025,
  arXiv:2512.05620, and Zheng et al. 2026, arXiv:2603.00541). Updates of a fixed size make such a factor the same as one
  of initial values and rate of what a branch ends with: its last matrix and bias, or the norm of its output. So the
  model computes what it does without a parametrization, and its weights go to every class that takes it.
- Epsilon follows the gradients (CompleteP, equation 40).
- The product of rate and weight decay stays that of the base model: decay has the inverse of the rate's factor
  (CompleteP, table 1; Wortsman et al. 2023, arXiv:2309.14322; Kosson et al. 2025, arXiv:2510.19093).
"""

import math
from typing import NamedTuple

from model.config import ResolvedModelConfig


class Factors(NamedTuple):
    """Factors of the initial values, the learning rate and epsilon of a parameter."""

    initial: float = 1.0
    rate: float = 1.0
    epsilon: float = 1.0


def size_factors(c: ResolvedModelConfig, name: str, role: str, orthogonalized: bool = False) -> Factors:
    """Returns the factors that the size of the model puts on a parameter of the table.

    Args:
        role: that of the parameter table.
        orthogonalized: the updates are Muon's, not Adam's or Lion's.
    """
    if c.parametrization == "standard":
        return Factors()
    assert c.base_dim
    r, a = c.model_dim / c.base_dim, (c.base_layers or c.num_layers) / c.num_layers
    # Rows that are multiplied by √D need the inverse rate, and have gradients as much larger.
    table = math.sqrt(r) if c.scale_embeddings else 1.0
    is_single = c.num_kv_heads == 1 and name in ("blocks.attention.key", "blocks.attention.value")
    vector = Factors(epsilon=(a if name.startswith("blocks.") else 1) / r)
    factors = {
        "embedding": Factors(rate=1 / table, epsilon=table / r),
        "position": Factors(epsilon=1 / r),
        "norm": vector,
        "bias": vector,
        "matrix": Factors(rate=1 / math.sqrt(r) if orthogonalized and not is_single else 1 / r, epsilon=a / r),
        "router": Factors(1 / math.sqrt(r), 1 / r, a),
        "unembedding": Factors(1 / math.sqrt(r), 1 / r),
        "balance": Factors(),
    }[role]
    if not ends_branch(c, name):
        return factors
    return Factors(factors.initial * a, factors.rate * a, factors.epsilon / a)


def ends_branch(c: ResolvedModelConfig, name: str) -> bool:
    """True for what scales the output of attention or of a feed-forward last: a matrix and its bias, or a norm."""
    block, *rest = name.split(".")
    if block != "blocks":
        return False
    norms = {"output": ("attention_norm", "feedforward_norm")}
    norms["both"] = ("attention_output_norm", "feedforward_output_norm")
    if c.norm_placement in norms:
        return rest[0] in norms[c.norm_placement]
    return rest[-1] in ("output", "output_bias", "down", "down_bias")
