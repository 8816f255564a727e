"""The family of a config: smaller models of the same kind, and the lengths of their runs, for a law of their losses.

One dial: width and depth shrink together. `model_dim`, `feedforward_dim` and other widths shrink by one factor, in
steps of half a head; heads keep their width, and their number is rounded up; layers shrink by nearly the same factor,
in whole periods of `layer_pattern`. Of all such sizes, those are taken that come nearest to a geometric series of N
(see `train.planning.scaling`), and to the config's shape.

The config's own values are the anchor of what depends on size, q being a rung's N as a share of the config's:

- rows of a step ∝ q^(2/3), to a power of 2 of the config's, and learning rate ∝ q^(-1/3): the rules of OLMo's ladder
  (allenai/OLMo-core, src/olmo_core/model_ladder), both by N alone, so that one trunk serves all numbers of tokens. By
  compute, DeepSeek's rows ∝ C^0.33 (Bi et al. 2024) and Marin's ∝ C^0.36 are nearly the same, as C ∝ N². A step has
  LEAST_STEP_TOKENS, or as many as the config's, however small the model: with half as many a rung lost 0.07 bits a byte
  at its best rate, and few rows leave few streams (docs/ladder.md).
- with `model.parametrization` = mup the learning rate is the config's own, since each rung's follows from its size:
  `base_dim` and `base_layers` (or the config's own number of layers) are the same for all.
- streams of the corpus are the same for all rungs, so that these read the same order of text. (The cut of a small
  corpus into chunks, and so which held-out documents are the first, depends on their number.)
- tokens ∝ N; each rung has POINTS lengths, a factor of 2 apart, the shortest of LEAST_STEPS or more.
- warm-up is the config's share of the run that has its tokens a parameter, and at most half of the shortest trunk: a
  long one makes small models look worse (Porian et al. 2024).
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.errors import InputError
from model.config import ModelConfig
from model.parameters import count_parameters
from train.config.config import Config
from train.config.reading import divisors
from train.planning.plan import tokens_of_run
from train.planning.scaling import LEAST_SIZES
from train.step.flops import flops_per_token

POINTS = 4
SPACING, LEAST_SPACING = 2.0, 1.25
# Widths other than those of heads are multiples of this.
WIDTH_MULTIPLE = 8
# By default; shorter runs lie above the law of the others (docs/ladder.md).
LEAST_STEPS = 400
LEAST_STEP_TOKENS = 2048
# The weight of a size's shape against its N, both as logs.
SHAPE_WEIGHT = 0.2
WIDTHS = ("feedforward_dim", "expert_dim", "shared_expert_dim", "kv_latent_dim", "query_latent_dim")
MOST_DECAY = 0.9


class Size(NamedTuple):
    """A model of the family.

    Attributes:
        model: its settings; those of size differ from the config's.
        N: FLOPs of a token / 6.
        shape: how far its depth and heads are from the proportions of the config, as a sum of logs.
    """

    model: ModelConfig
    N: float
    shape: float


@dataclass(frozen=True)
class Rung:
    """One size, and its runs: a trunk of constant learning rate, and branches that decay from it.

    Attributes:
        N: FLOPs of a token / 6.
        parameters: number of all parameters.
        fields: settings of all its runs that differ from the config's, by "group.field".
        branches: (step of the trunk, number of steps) of each branch, the shortest first.
        step_tokens: positions of a step.
    """

    N: float
    parameters: int
    fields: dict[str, Any]
    branches: tuple[tuple[int, int], ...]
    step_tokens: int

    @property
    def trunk_steps(self) -> int:
        """The steps of the trunk, up to the last branch."""
        return self.branches[-1][0]

    @property
    def steps(self) -> int:
        """The steps of all its runs; those before a branch are the trunk's."""
        return self.trunk_steps + sum(end - begin for begin, end in self.branches)


def size_of(config: Config, model: ModelConfig | None = None) -> float:
    """Returns N, the model FLOPs of a token / 6, of a config, or of its `model` of another size."""
    T = config.data.segment_length
    resolved = (model or config.model).resolved(config.tokenizer.vocab_size, T)
    return flops_per_token(resolved, T) / 6


def sizes(config: Config) -> list[Size]:
    """Returns all models of the family up to the config's own, by N."""
    model = config.model
    if model.parametrization == "mup":
        # By default a model's own layers are those of its base, and then no rate would follow from the depth.
        model = dataclasses.replace(model, base_layers=model.base_layers or model.num_layers)
    period = len(model.layer_pattern or "F")
    # A model of one layer is none of the family: nothing in it can use what attention has found (induction heads need
    # two layers: Olsson et al. 2022), and its losses do not lie on the law of the others.
    least = math.ceil(min(2, model.num_layers) / period)
    found = [Size(model, size_of(config), 0.0)]
    for halves in range(2, 2 * model.num_heads + 1):
        width = halves / 2 / model.num_heads
        periods = model.num_layers * width / period
        near = range(max(least, math.floor(periods) - 1), max(least, math.ceil(periods) + 1) + 1)
        for layers in sorted({period * number for number in near if period * number <= model.num_layers}):
            smaller = shrunk(model, width, layers)
            if smaller is not None and smaller != model:
                of_heads = smaller.num_heads / model.num_heads
                shape = abs(math.log(layers / model.num_layers / width)) + math.log(of_heads / width)
                found.append(Size(smaller, size_of(config, smaller), shape))
    return sorted(found, key=lambda size: size.N)


def shrunk(model: ModelConfig, width: float, layers: int) -> ModelConfig | None:
    """Returns a model with fewer layers and all widths times `width`, or None where that is none. Heads are whole."""
    head_dim = model.head_dim or model.model_dim // model.num_heads
    heads = math.ceil(model.num_heads * width)
    model_dim = 2 * max(1, round(model.model_dim * width / 2))
    values: dict[str, Any] = {"num_layers": layers, "num_heads": heads, "model_dim": model_dim}
    if model_dim != heads * head_dim:
        values["head_dim"] = head_dim
    if model.num_kv_heads is not None:
        ideal = heads * model.num_kv_heads / model.num_heads
        values["num_kv_heads"] = min(reversed(divisors(heads)), key=lambda number: abs(number - ideal))
    for name in WIDTHS:
        if (value := getattr(model, name)) is not None:
            values[name] = WIDTH_MULTIPLE * max(1, round(value * width / WIDTH_MULTIPLE))
    if model.dense_layers:
        values["dense_layers"] = max(1, round(model.dense_layers * layers / model.num_layers))
    smaller = dataclasses.replace(model, **values)
    return None if smaller.problems() else smaller


def make_rungs(
    config: Config, number: int, scale: float, longest: float, least_rows: int = 1, least_steps: int = LEAST_STEPS
) -> list[Rung]:
    """Returns the rungs of a config, the smallest first.

    Raises InputError where the config has no family of that many sizes, or no decay.

    Args:
        number: how many rungs there are.
        scale: the config's N over that of the largest rung.
        longest: tokens a parameter of the longest run of a rung, over those of the config's own run.
        least_rows: rows of a step are a multiple of this, as the devices divide them.
        least_steps: the fewest of a run, which then has more tokens a parameter.
    """
    family, top = sizes(config), size_of(config) / scale
    if not (chosen := series(family, top, number)):
        possible = [fewer for fewer in range(LEAST_SIZES, number) if series(family, top, fewer)]
        remedy = f"{possible[-1]} are possible; lower --rungs or --scale" if possible else "lower --scale"
        raise InputError(
            f"--rungs={number} --scale={scale:g}: this config shrinks to no {number} sizes from N = {top:.3g} down, "
            f"{SPACING:g} to {LEAST_SPACING:g} times apart, as it has {config.model.num_heads} heads, "
            f"{config.model.num_layers} layers and an unembedding that sets N = {family[0].N:.3g} as the least; "
            f"{remedy}, or give a larger config or a smaller vocabulary"
        )
    rows = [rows_of(config, size, least_rows) for size in chosen]
    streams = math.gcd(*rows, config.data.num_streams or 0)
    return [make_rung(config, size, longest, of, streams, least_steps) for size, of in zip(chosen, rows, strict=True)]


def rows_of(config: Config, size: Size, least_rows: int) -> int:
    """Returns the rows of a step of a size, a multiple of the least number."""
    batch_size, T = config.train.batch_size, config.data.segment_length
    most = max(math.floor(math.log2(batch_size * T / LEAST_STEP_TOKENS)), 0)
    rows = batch_size / 2 ** min(round(-2 / 3 * math.log2(size.N / size_of(config))), most)
    return max(round(rows / least_rows), 1) * least_rows


def series(family: Sequence[Size], top: float, number: int) -> list[Size]:
    """Returns the sizes nearest to a geometric series of N that ends at `top`; none where two are too near."""
    spacing = min(SPACING, max(top / family[0].N, 1.0) ** (1 / max(number - 1, 1)))
    wanted = [top / spacing**place for place in reversed(range(number))]
    chosen = [min(family, key=lambda size: abs(math.log(size.N / N)) + SHAPE_WEIGHT * size.shape) for N in wanted]
    too_near = any(large.N < LEAST_SPACING * small.N for small, large in itertools.pairwise(chosen))
    return [] if too_near or LEAST_SPACING * top < chosen[-1].N else chosen


def rate_fields(config: Config, factor: float) -> dict[str, Any]:
    """Returns the fields of the learning rate times a factor, that of groups with a rate of their own, too."""
    scaled = lambda rate: float(f"{rate * factor:.4g}")
    fields: dict[str, Any] = {"optimizer.learning_rate": scaled(config.optimizer.learning_rate)}
    groups = {
        name: given | ({"learning_rate": scaled(given["learning_rate"])} if "learning_rate" in given else {})
        for name, given in config.optimizer.groups.items()
    }
    return fields | ({"optimizer.groups": json.dumps(groups)} if groups != config.optimizer.groups else {})


def make_rung(
    config: Config, size: Size, longest: float, rows: int, streams: int, least_steps: int = LEAST_STEPS
) -> Rung:
    """Returns the rung of a size, as `make_rungs` does, with these rows of a step and streams of the corpus."""
    N, T = size_of(config), config.data.segment_length
    share = size.N / N
    steps = share * tokens_of_run(config.resolved(config.tokenizer.vocab_size)) / (rows * T)  # at the config's ratio
    decay = config.optimizer.decay_fraction
    if not 0 < decay <= MOST_DECAY:
        raise InputError(
            f"optimizer.decay_fraction = {decay:g}: a branch is the decay of a run, and its trunk what comes before; "
            f"give a share above 0 and up to {MOST_DECAY}"
        )
    first = round(max(steps * longest / 2 ** (POINTS - 1), least_steps) * (1 - decay))
    # Saves on the way to the first branch, and to each of the others, are equally far apart.
    saves = -(-first // config.checkpoint.every_steps)
    first = -(-first // saves) * saves
    begins = [first * 2**place for place in range(POINTS)]
    branches = tuple((begin, max(round(begin / (1 - decay)), begin + 1)) for begin in begins)
    warmup = config.optimizer.steps_of_warmup(config.train.num_steps) / config.train.num_steps
    parts = config.train.accumulation_steps
    rate = 1.0 if config.model.parametrization == "mup" else share ** (-1 / 3)
    # As many rows at once as the config has, or fewer: the models are smaller.
    accumulation = next(part for part in divisors(rows) if rows / part <= max(config.train.batch_size // parts, 1))
    fields: dict[str, Any] = {
        **{f"model.{name}": value for name, value in vars(size.model).items() if value != getattr(config.model, name)},
        "train.batch_size": rows,
        "train.accumulation_steps": accumulation,
        **rate_fields(config, rate),
        "optimizer.schedule": "wsd",
        "optimizer.warmup_steps": min(math.ceil(steps * warmup), first // 2),
        "train.batch_ramp_start": None,
        "train.batch_ramp_steps": None,
        "data.num_streams": streams,
    }
    resolved = size.model.resolved(config.tokenizer.vocab_size, T)
    save = {"checkpoint.every_steps": first // saves}
    return Rung(size.N, count_parameters(resolved), fields | save, branches, rows * T)
