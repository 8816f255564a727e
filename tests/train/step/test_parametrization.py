"""Under mup the settings for one size do to every other what they do to it; under standard they do not."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import InputError
from model.config import ModelConfig
from model.decoder import Block, Decoder
from model.kernels import attention_over
from model.layers import layer_kinds
from model.parameters import initial_weights, parameter_table
from model.parametrization import ends_branch
from model.sharding import UNSHARDED
from model.trees import flattened, nested
from tests.optimizers import RATES, updated_on
from tests.small import mesh_of
from train.config.config import Config
from train.config.parameter_groups import parameter_settings
from train.config.reading import make_config
from train.step.optimizer import make_optimizer
from train.step.step import summed_loss

BASE_DIM, BASE_LAYERS, STEPS, VOCABULARY = 64, 2, 4, 128
MUP = {"parametrization": "mup", "base_dim": BASE_DIM, "base_layers": BASE_LAYERS}
# Rates at which the base model changes by a tenth in four steps.
GENTLE = {"adamw": 1e-3, "muon": 4e-3}


def config_for(name: str, width: int = BASE_DIM, layers: int = BASE_LAYERS, optimizer=(), **model: object) -> Config:
    sizes = {"num_layers": layers, "model_dim": width, "num_heads": width // 32, "head_dim": 32}
    sizes |= {"feedforward_dim": width, "vocab_size": VOCABULARY, "compute_dtype": "float32"}
    values = {"name": name, "learning_rate": GENTLE.get(name, 1e-3), "warmup_steps": 0} | dict(optimizer)
    train = {"batch_size": 8, "num_steps": 1000}
    return make_config({"model": sizes | model, "optimizer": values, "train": train}).resolved()


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (8, 17), dtype=np.int32)
    ones, positions = np.ones((8, 16), np.int32), np.tile(np.arange(16, dtype=np.int32), (8, 1))
    batch = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "positions": positions}
    return batch | {"segment_ids": ones, "loss_weights": ones.astype(np.float32)}


def activations(config: Config, weights: dict) -> list[jax.Array]:
    """The residual stream after the embedding and after each layer, and the logits."""
    x_BTD, x_LBTD, logits_BTV = compiled_activations(config.model, weights)
    return [x_BTD, *x_LBTD, logits_BTV]


@functools.partial(jax.jit, static_argnums=0)
def compiled_activations(model: ModelConfig, weights: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays, decoder = batch(), Decoder(model, weights)
    x_BTD, rotations = decoder.position(decoder.embedding(arrays["tokens"]), arrays["positions"])
    attention = attention_over(model, UNSHARDED, jnp.asarray(arrays["segment_ids"]), None)
    rotation = rotations[layer_kinds(model)[0].rope]

    def layer(x_BTD: jax.Array, weights: dict) -> tuple[jax.Array, jax.Array]:
        x_BTD = Block(model, weights, UNSHARDED)(x_BTD, rotation, attention)[0]
        return x_BTD, x_BTD

    last_BTD, x_LBTD = jax.lax.scan(layer, x_BTD, weights["blocks"])
    last_BTD = last_BTD if decoder.norm is None else decoder.norm(last_BTD)
    return x_BTD, x_LBTD, decoder.logits(last_BTD)[..., :VOCABULARY]


def trained(config: Config, weights: dict) -> dict:
    """The weights after STEPS updates on one batch."""
    optimizer = make_optimizer(config)

    @jax.jit
    def step(weights: dict, state: dict) -> tuple:
        gradients = jax.grad(lambda weights: summed_loss(config, weights, batch())[0] / 128)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return jax.tree.map(jnp.add, weights, updates), state

    state = optimizer.init(weights)
    for _ in range(STEPS):
        weights, state = step(weights, state)
    return weights


@functools.cache
def changes(name: str, width: int = BASE_DIM, layers: int = BASE_LAYERS, mup: bool = False) -> np.ndarray:
    """Root mean squares of what STEPS updates change: embedding, layers, logits."""
    config = config_for(name, width, layers, **MUP if mup else {})
    with jax.set_mesh(mesh_of()):
        weights = jax.jit(lambda: initial_weights(config.model, 0))()
        before, after = activations(config, weights), activations(config, trained(config, weights))
    return np.array([np.sqrt(np.mean(np.square(new - old))) for old, new in zip(before, after, strict=True)])


@pytest.mark.parametrize("name", GENTLE)
def test_updates_change_activations_alike_at_every_width_and_under_standard_ever_more(name: str):
    base = changes(name)
    wide = changes(name, 512, mup=True)
    assert np.all(wide[:-1] < 1.4 * base[:-1]), wide / base
    assert np.all(wide[:-1] > 0.7 * base[:-1]), wide / base
    # The part of the change that initial values of the unembedding make falls as 1/√width.
    assert 0.4 * base[-1] < wide[-1] < 1.4 * base[-1], wide / base
    standard = changes(name, 256)
    assert np.all(standard[1:] > 1.6 * base[1:]), standard / base


@pytest.mark.parametrize("name", GENTLE)
def test_updates_change_activations_alike_at_every_depth_and_under_standard_ever_more(name: str):
    base = changes(name)[-2:]
    deep = changes(name, layers=16, mup=True)[-2:]
    assert np.all(deep < 1.5 * base), deep / base
    assert np.all(deep > base / 2), deep / base
    standard = changes(name, layers=16)[-2:]
    assert standard[0] > 2 * base[0], standard / base


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "normuon", "soap_muon"])
def test_at_the_base_size_both_are_the_same(name: str):
    standard, mup = config_for(name), config_for(name, **MUP)
    assert parameter_table(mup.model) == parameter_table(standard.model)
    assert parameter_settings(mup) == parameter_settings(standard)
    if name == "muon":
        np.testing.assert_array_equal(changes(name, mup=True), changes(name))


@pytest.mark.parametrize(
    "model",
    [
        {"attention_bias": True, "feedforward_bias": True, "norm": "layernorm"},
        {"norm_placement": "both", "norm_offset": True, "scale_embeddings": True},
    ],
    ids=str,
)
def test_initial_values_and_rates_do_what_the_multipliers_of_the_papers_do(model: dict):
    # With an epsilon and a decay that matter.
    optimizer = {"clip_norm": 0.0, "weight_decay": 20.0, "epsilon": 1e-3}
    sizes, c = {"width": 2 * BASE_DIM, "layers": 4}, {"rate": 1e-3, "decay": 20.0, "epsilon": 1e-3}
    r, a, root = 2, 1 / 2, math.sqrt(BASE_DIM if model.get("scale_embeddings") else 1)
    given = lambda rate=1.0, decay=1.0, epsilon=1.0: {
        "learning_rate": c["rate"] * rate, "weight_decay": c["decay"] * decay, "epsilon": c["epsilon"] * epsilon,
    }  # fmt: skip
    vector = lambda epsilon: {"learning_rate": c["rate"], "epsilon": c["epsilon"] * epsilon}
    groups = {
        "embedding": given(root, 1 / root, 1 / (r * root)),
        "matrix": given(1 / r, r, a / r),
        "unembedding": given(epsilon=1 / r),
        "vector": vector(a / r),
        "norm.*": vector(1 / r),
    }
    mup = config_for("adamw", **sizes, optimizer=optimizer, **model, **MUP)
    # An unembedding that starts as under standard, with the factor 1/r of the logits.
    by_hand = model | {"scale_embeddings": False, "residual_multiplier": a, "logit_multiplier": 1 / r}
    theirs = config_for("adamw", **sizes, optimizer=optimizer | {"groups": groups}, **by_hand)

    def unfolded(weights: dict) -> dict:
        offset = float(mup.model.norm_offset)
        flat = flattened(weights)
        for name in flat:
            if ends_branch(mup.model, name):
                flat[name] = (flat[name] + offset) / a - offset if "norm" in name else flat[name] / a
        flat["unembedding.matrix"] = flat["unembedding.matrix"] * r
        if model.get("scale_embeddings"):
            flat["embedding.table"] = flat["embedding.table"] * math.sqrt(2 * BASE_DIM)
        return nested(flat)

    with jax.set_mesh(mesh_of()):
        weights = jax.jit(lambda: initial_weights(mup.model, 0))()
        found, expected = trained(mup, weights), trained(theirs, unfolded(weights))
        of = lambda config, weights: np.asarray(activations(config, weights)[-1])
        np.testing.assert_allclose(of(theirs, unfolded(weights)), of(mup, weights), atol=1e-5)
        np.testing.assert_allclose(of(mup, found), of(theirs, expected), atol=2e-4)
        assert np.abs(of(mup, found) - of(mup, weights)).max() > 0.02


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        ({}, {"blocks.attention.output", "blocks.feedforward.down"}),
        ({"norm_placement": "output"}, {"blocks.attention_norm.scale", "blocks.feedforward_norm.scale"}),
        (
            {"norm_placement": "both", "norm_offset": True},
            {"blocks.attention_output_norm.scale", "blocks.feedforward_output_norm.scale"},
        ),
    ],
)
def test_what_ends_a_branch_has_the_factor_of_the_depth(model: dict, ends: set[str]):
    shallow, deep = (config_for("lion", layers=layers, **MUP, **model) for layers in (2, 8))
    before, after = parameter_settings(shallow), parameter_settings(deep)
    assert {name for name in after if after[name].learning_rate != before[name].learning_rate} == ends
    tables = parameter_table(shallow.model), parameter_table(deep.model)
    for name in ends:
        assert 4 * after[name].learning_rate == pytest.approx(before[name].learning_rate)
        start = [table[name].scale + deep.model.norm_offset for table in tables]
        assert 4 * start[1] == pytest.approx(start[0])


def test_experts_are_matrices_and_routers_have_few_outputs():
    experts = {"num_experts": 4, "expert_dim": 64, "router_bias": True, "balance_bias": True}
    config = config_for("muon", 256, optimizer={"learning_rate": 1.0}, **experts, **MUP)
    rates = {name.split(".")[-1]: s.learning_rate for name, s in parameter_settings(config).items()}
    assert rates["gate_up"] == rates["down"] == 1 / 2
    assert (rates["router"], rates["router_bias"], rates["balance"]) == (1 / 4, 1, 1)
    assert parameter_table(config.model)["blocks.experts.router"].scale == 1 / 16


def test_a_single_key_head_keeps_its_width():
    rates = lambda heads: {
        name: s.learning_rate * 1e3
        for name, s in parameter_settings(
            config_for("muon", 256, optimizer={"learning_rate": 1e-3}, num_kv_heads=heads, **MUP)
        ).items()
    }
    assert rates(4)["blocks.attention.key"] == rates(1)["blocks.attention.query"] == pytest.approx(1 / 2)
    assert rates(1)["blocks.attention.key"] == rates(1)["blocks.attention.value"] == pytest.approx(1 / 4)


def test_every_mesh_updates_as_one_device_does():
    config = config_for("muon", 128, 4, optimizer={"learning_rate": RATES["muon"]}, **MUP)
    alone, shared = updated_on(config), updated_on(config, {"fsdp": 2, "tensor": 2})
    for name, array in alone.items():
        assert np.linalg.norm(shared[name] - array) < 1e-4 * np.linalg.norm(array), name


@pytest.mark.parametrize(
    ("model", "optimizer", "words"),
    [
        ({"base_dim": None}, {}, "model.parametrization = mup needs model.base_dim"),
        ({"parametrization": "standard"}, {}, "model.base_dim has no effect with model.parametrization = standard"),
        ({"tie_embeddings": True}, {}, "model.parametrization = mup trains embedding and unembedding at different"),
        ({"norm_placement": "post"}, {}, "give another model.norm_placement"),
        ({"num_experts": 4, "shared_expert_dim": 64, "shared_expert_gate": True}, {}, "no rule for model.shared"),
        ({"kv_latent_dim": 16, "rope_dim": 16}, {}, "no rule for model.kv_latent_dim"),
        ({"smear": True}, {}, "no rule for model.smear"),
        ({"base_dim": 48}, {}, "model.num_heads = 4 would be 1.5 at model.base_dim = 48"),
        ({"num_kv_heads": 2, "base_dim": 32}, {}, "model.num_kv_heads = 2 would be 0.5 at model.base_dim = 32"),
        ({}, {"name": "soap"}, "no rule for optimizer.name = soap; give adamw, lion, muon, normuon, soap_muon"),
        ({}, {"name": "adafactor"}, "no rule for optimizer.name = adafactor"),
    ],
)
def test_what_has_no_rule_is_refused(model: dict, optimizer: dict, words: str):
    with pytest.raises(InputError) as caught:
        config_for("adamw", 128, optimizer=optimizer, **MUP | model)
    assert words in str(caught.value)
