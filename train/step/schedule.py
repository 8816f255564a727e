"""Schedules over the steps of a run: the learning rate, weight decay, Muon's momentum and the batch size."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from train.config.config import Config
from train.config.optimizer_config import OptimizerConfig


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the function from update number (from 0) to learning rate: a linear warm-up, then one of

    - cosine to `final_fraction` of the peak at the last step (Loshchilov and Hutter 2017, arXiv:1608.03983);
    - linear to the same;
    - wsd: the peak, then linear to `final_fraction` over the last `decay_fraction` of the run (Hu et al. 2024,
      arXiv:2404.06395);
    - inverse_sqrt of the update number, for any length of run (Vaswani et al. 2017, arXiv:1706.03762, equation 3,
      scaled to the peak).

    The update after warm-up is the first at the peak, and the run's last update has the final rate, except with
    inverse_sqrt, which has no final rate.
    """
    c = config.optimizer
    warmup = c.steps_of_warmup(config.train.num_steps)
    remaining = max(config.train.num_steps - 1 - warmup, 0)
    decay = min(round(c.decay_fraction * config.train.num_steps), remaining)
    peak = c.learning_rate
    final = peak * c.final_fraction
    # Starts at 1/(warmup + 1) of the peak, since an update with a rate of zero would be wasted.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    falls = {
        "cosine": optax.cosine_decay_schedule(peak, max(remaining, 1), alpha=c.final_fraction),
        "linear": optax.linear_schedule(peak, final, max(remaining, 1)),
        "wsd": optax.linear_schedule(peak, final, max(decay, 1), transition_begin=remaining - decay),
        # `since` counts updates from the peak, which is update number warmup + 1.
        "inverse_sqrt": lambda since: peak * jnp.sqrt((warmup + 1) / (warmup + 1 + since)),
    }
    joined = optax.join_schedules([rise, falls[c.schedule]], [warmup])
    # Rounding can take a linear decay slightly below zero.
    return lambda step: jnp.maximum(joined(step), 0.0)


def weight_decay_factor(config: Config) -> optax.Schedule | None:
    """Returns the function from update number to what weight decay is multiplied by, besides the learning rate.

    - rate: nothing (None).
    - corrected: the learning rate's share of its peak, as in AdamC (Defazio 2025, arXiv:2506.02285), so that the ratio
      of gradients to weights does not rise as the rate falls.
    - linear, cosine: from 1 at the first update to 0 after the last.
    """
    c, num_steps = config.optimizer, config.train.num_steps
    schedules: dict[str, optax.Schedule | None] = {
        "rate": None,
        "corrected": learning_rate(replace(config, optimizer=replace(c, learning_rate=1.0))),
        "linear": lambda step: jnp.maximum(1 - step / num_steps, 0.0),
        "cosine": lambda step: (1 + jnp.cos(jnp.pi * jnp.minimum(step / num_steps, 1.0))) / 2,
    }
    return schedules[c.weight_decay_schedule]


def momentum_at(c: OptimizerConfig, step: jax.Array) -> jax.Array | float:
    """Returns Muon's momentum of an update: a linear rise from `muon_momentum_start`, if there is one."""
    if c.muon_momentum_start is None:
        return c.muon_momentum
    done = jnp.minimum(step / c.muon_momentum_warmup_steps, 1.0)
    return (1 - done) * c.muon_momentum_start + done * c.muon_momentum


def batch_size(config: Config, step: int) -> int:
    """Returns the rows of the update numbered `step` (from 0).

    With a ramp the batch doubles from `batch_ramp_start` to `batch_size` in equally long stages over the first
    `batch_ramp_steps`. GPT-3 (Brown et al. 2020, arXiv:2005.14165) grew its batch linearly; here every size
    needs a compiled program of its own, so there are few.
    """
    c = config.train
    if c.batch_ramp_start is None or c.batch_ramp_steps is None:
        return c.batch_size
    doublings = (c.batch_size // c.batch_ramp_start).bit_length() - 1
    return c.batch_ramp_start << min(step * doublings // c.batch_ramp_steps, doublings)


def rows_read(config: Config, step: int) -> int:
    """Returns the rows of the data that the update numbered `step` (from 0) reads: of sampled answers, its prompts."""
    return batch_size(config, step) // config.objective.rows_of_prompt


def batch_stages(config: Config, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Returns stages (begin, end, rows) of equal batches, of the updates from `begin` (from 0) to before `end`."""
    c = config.train
    cuts = {begin, end}
    if c.batch_ramp_start is not None and c.batch_ramp_steps is not None:
        doublings = (c.batch_size // c.batch_ramp_start).bit_length() - 1
        cuts |= {-(-k * c.batch_ramp_steps // doublings) for k in range(1, doublings + 1)}
    ordered = sorted(cut for cut in cuts if begin <= cut <= end)
    return [(first, last, batch_size(config, first)) for first, last in itertools.pairwise(ordered)]


def read_stages(config: Config, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Returns the same stages with the positions that each update reads, as `data.provenance.summarize` takes them."""
    positions = config.data.segment_length
    stages = batch_stages(config, begin, end)
    return [(first, last, rows_read(config, first) * positions) for first, last, _ in stages]


def rows_between(config: Config, begin: int, end: int) -> int:
    """Returns the rows of the updates from `begin` (from 0) to before `end`, without a walk over them."""
    return sum((last - first) * rows for first, last, rows in batch_stages(config, begin, end))


def accumulation_parts(config: Config, rows: int) -> int:
    """Returns the number of accumulation parts for a batch of `rows`; no part exceeds a part of the full batch."""
    return max(1, config.train.accumulation_steps * rows // config.train.batch_size)
