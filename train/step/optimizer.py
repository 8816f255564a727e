"""Optimizers: the chain of transformations from gradients to updates of the weights."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.parameters import Parameter, parameter_table
from model.trees import flattened, nested
from train.config.config import ResolvedConfig
from train.config.optimizer_config import DECAY, MOMENTUM, OptimizerConfig
from train.config.parameter_groups import parameter_settings
from train.step.adafactor import scale_by_adafactor
from train.step.muon import orthogonalize
from train.step.normuon import normalize_neurons
from train.step.schedule import learning_rate, momentum_at, weight_decay_factor
from train.step.soap import momentum_by_soap, scale_by_soap
from train.step.state import Weights

# Fields of the settings of a group that the links of the chain use.
ADAM = ("beta1", "beta2", "epsilon")
RATE = ("learning_rate", "schedule", "warmup_steps", "decay_fraction", "final_fraction")


def make_optimizer(config: ResolvedConfig) -> optax.GradientTransformation:
    """Returns the optimizer of `optimizer.name`, with clipping by global norm and decay by the parameter table.

    - adamw: Loshchilov and Hutter 2019, arXiv:1711.05101.
    - lion: Chen et al. 2023, arXiv:2302.06675.
    - adafactor: see `adafactor.py`; the schedule is its relative step size.
    - muon, normuon, soap, soap_muon: see `muon.py`, `normuon.py` and `soap.py`, for matrices, and AdamW for all other
      parameters.

    The state is a dictionary by the names of the chain, so a checkpoint does not depend on their order, nor on
    `optimizer.groups`. Moments are stored in `optimizer.moment_dtype` and are float32 while they are used.
    """
    c = config.optimizer
    table = parameter_table(config.model)
    settings = parameter_settings(config)
    matrices = [name for name, p in table.items() if p.role == "matrix"]
    others = [name for name in table if name not in matrices]
    grouped = partial(by_settings, settings)
    adam = grouped(ADAM, lambda s: optax.scale_by_adam(s.beta1, s.beta2, s.epsilon))
    orthogonal = only(matrices, orthogonalize(table, jnp.dtype(config.model.compute_dtype)))
    others_adam = {"adam": only(others, adam)}
    muon = {"momentum": only(matrices, grouped(MOMENTUM, momentum)), "orthogonal": orthogonal}
    neurons = {"neurons": only(matrices, grouped(("beta2",), lambda s: normalize_neurons(table, s.beta2)))}
    soap = {"soap": only(matrices, grouped(ADAM, lambda s: scale_by_soap(table, s)))}
    soap_muon = {"soap": only(matrices, grouped((*ADAM, *MOMENTUM), lambda s: momentum_by_soap(table, s)))}
    rules = {
        "adamw": {"adam": adam},
        "lion": {"lion": grouped(ADAM, lambda s: optax.scale_by_lion(s.beta1, s.beta2))},
        "adafactor": {"adafactor": scale_by_adafactor(table)},
        "muon": muon | others_adam,
        "normuon": muon | neurons | others_adam,
        "soap": soap | others_adam,
        "soap_muon": soap_muon | {"orthogonal": orthogonal} | others_adam,
    }
    with_settings = lambda s: replace(config, optimizer=s)
    chain = optax.named_chain(
        ("clip", optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()),
        *((name, stored_in(jnp.dtype(c.moment_dtype), rule)) for name, rule in rules[c.name].items()),
        ("decay", grouped((*RATE, *DECAY), lambda s: decay_weights(with_settings(s), table))),
        ("schedule", grouped(RATE, lambda s: optax.scale_by_learning_rate(learning_rate(with_settings(s))))),
    )

    def update(gradients: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        return chain.update(gradients, state, weights, step=state["schedule"].count)

    return optax.GradientTransformation(chain.init, update)


def by_settings(
    settings: Mapping[str, OptimizerConfig],
    fields: Collection[str],
    rule: Callable[[OptimizerConfig], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Applies a rule to all parameters, to those at once whose settings are equal in the fields that it uses.

    Its state must be a named tuple whose dictionaries are by parameter, and does not depend on the settings.
    """

    def update(gradients: Weights, state: Any, weights: Weights, **extra: Any) -> tuple[Weights, Any]:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name in flattened(gradients):
            groups.setdefault(tuple(getattr(settings[name], field) for field in fields), []).append(name)
        results = []
        for names in groups.values():
            part = type(state)(*(select(names, x) if isinstance(x, dict) else x for x in state))
            of_group = optax.with_extra_args_support(rule(settings[names[0]]))
            results.append(of_group.update(select(names, gradients), part, select(names, weights), **extra))
        updates, states = zip(*results, strict=True)
        return joined(updates), type(state)(
            *(joined(parts) if isinstance(parts[0], dict) else parts[0] for parts in zip(*states, strict=True))
        )

    return optax.GradientTransformationExtraArgs(rule(next(iter(settings.values()))).init, update)


def momentum(s: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Muon's sum of gradients with Nesterov's look-ahead; `update` takes the number of the step."""

    def update(
        gradients: Weights, state: Any, weights: Weights | None = None, *, step: jax.Array
    ) -> tuple[Weights, Any]:
        return optax.trace(momentum_at(s, step), nesterov=True).update(gradients, state, weights)

    return optax.GradientTransformationExtraArgs(optax.trace(s.muon_momentum, nesterov=True).init, update)


def decay_weights(config: ResolvedConfig, table: Mapping[str, Parameter]) -> optax.GradientTransformation:
    """Adds weight decay to the updates of what decays by the parameter table; `update` takes the number of the step.

    Cautious decay (Chen et al. 2025, arXiv:2510.12402) leaves out the elements that the update moves away from zero:
    those whose update, which is subtracted, differs in sign from the weight.
    """
    c, factor = config.optimizer, weight_decay_factor(config)

    def update(updates: Weights, state: Any, weights: Weights, *, step: jax.Array) -> tuple[Weights, Any]:
        decay = c.weight_decay if factor is None else c.weight_decay * factor(step)

        def decayed(name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
            if c.weight_decay == 0 or not table[name].decay:
                return x
            shrunk = decay * weight
            return x + (jnp.where(x * weight >= 0, shrunk, 0.0) if c.cautious_weight_decay else shrunk)

        flat = flattened(weights)
        return nested({name: decayed(name, x, flat[name]) for name, x in flattened(updates).items()}), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def select(names: Collection[str], tree: Weights) -> Weights:
    """Returns the part of a tree with these names."""
    return nested({name: x for name, x in flattened(tree).items() if name in names})


def joined(trees: Iterable[Weights]) -> Weights:
    """Returns the tree with all names of some trees."""
    return nested({name: x for tree in trees for name, x in flattened(tree).items()})


def only(names: Collection[str], inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` to the named parameters and keeps state for them alone; all others pass through."""
    inner = optax.with_extra_args_support(inner)

    def update(gradients: Weights, state: Any, weights: Weights, **extra: Any) -> tuple[Weights, Any]:
        updates, state = inner.update(select(names, gradients), state, select(names, weights), **extra)
        return joined((gradients, updates)), state

    return optax.GradientTransformationExtraArgs(lambda weights: inner.init(select(names, weights)), update)


def stored_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` in float32 and stores the floating-point arrays of its state in `dtype` between updates."""
    inner = optax.with_extra_args_support(inner)

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradients: Weights, state: Any, weights: Weights, **extra: Any) -> tuple[Weights, Any]:
        updates, state = inner.update(gradients, cast(state, jnp.float32), weights, **extra)
        return updates, cast(state, dtype)

    return optax.GradientTransformationExtraArgs(lambda weights: cast(inner.init(weights), dtype), update)
