"""The family of a config: models of one kind whose sizes are a series, and runs that a law can be fitted to."""

import dataclasses
import itertools
import json
import math

import pytest

from data.errors import InputError
from launch.presets import load_config, presets
from model.config import ModelConfig
from model.layers import layer_kinds
from train.config.config import Config
from train.config.optimizer_config import OptimizerConfig
from train.config.parameter_groups import parameter_settings
from train.config.run_config import TrainConfig
from train.planning.family import LEAST_STEPS, POINTS, WIDTHS, Rung, make_rungs, size_of, sizes
from train.planning.scaling import LEAST_SIZES
from train.step.flops import flops_per_token

MODEL = ModelConfig(num_layers=12, model_dim=768, num_heads=12, num_kv_heads=4, vocab_size=4096)
TARGET = Config(
    model=MODEL,
    optimizer=OptimizerConfig(schedule="wsd", learning_rate=1e-3, warmup_steps=100, decay_fraction=0.25),
    train=TrainConfig(num_steps=10_000, batch_size=64, accumulation_steps=4),
)


def with_fields(config: Config, **groups: dict) -> Config:
    """A config with other values of some fields."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in groups.items()}
    return dataclasses.replace(config, **changed)


def model_of(config: Config, rung: Rung) -> ModelConfig:
    """The model of a rung."""
    values = {name.removeprefix("model."): value for name, value in rung.fields.items() if name.startswith("model.")}
    return dataclasses.replace(config.model, **values)


def test_sizes_are_a_series_below_the_target():
    rungs = make_rungs(TARGET, 5, 10, 2)
    for small, large in itertools.pairwise(rungs):
        assert 1.25 <= large.N / small.N < 3.2
    assert size_of(TARGET) / rungs[-1].N == pytest.approx(10, rel=0.25)
    for rung in rungs:
        model = model_of(TARGET, rung)
        resolved = model.resolved(4096, TARGET.data.segment_length)
        assert pytest.approx(flops_per_token(resolved, TARGET.data.segment_length) / 6) == rung.N
        assert model.problems() == []
        assert resolved.head_dim == 64
        assert resolved.num_heads == math.ceil(model.model_dim / 64)
        # Depth and width shrink together.
        assert 0.4 < (model.num_layers / 12) / (model.model_dim / 768) < 2.5


@pytest.mark.parametrize("name", presets())
def test_models_of_a_presets_family_are_of_its_kind(name: str):
    config = load_config(name, {})
    whole = config.model.resolved(config.tokenizer.vocab_size, config.data.segment_length)
    sized = {"num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "dense_layers", *WIDTHS}
    family = sizes(config)
    assert pytest.approx(size_of(config)) == family[-1].N
    assert family[-1].model == config.model
    assert len(family) > 3
    for size in family:
        changed = {field for field, value in vars(size.model).items() if value != getattr(config.model, field)}
        assert changed <= sized
        small = size.model.resolved(config.tokenizer.vocab_size, config.data.segment_length)
        assert small.head_dim == whole.head_dim
        assert small.num_heads % small.num_kv_heads == 0
        # What one layer finds, another uses.
        assert small.num_layers >= 2
        assert set(layer_kinds(small)) == set(layer_kinds(whole))


def test_rows_and_rate_follow_n_from_the_configs_own():
    for rung in make_rungs(TARGET, 5, 10, 2):
        q, rows = rung.N / size_of(TARGET), rung.fields["train.batch_size"]
        assert rung.fields["optimizer.learning_rate"] == pytest.approx(1e-3 * q ** (-1 / 3), rel=1e-3)
        assert rows == max(64 / 2 ** round(-2 / 3 * math.log2(q)), 8)
        assert rung.step_tokens == rows * TARGET.data.segment_length
        # No more rows at once than the target has.
        assert rows / rung.fields["train.accumulation_steps"] <= 16
        assert rows % rung.fields["train.accumulation_steps"] == 0


@pytest.mark.parametrize(("T", "rows", "least"), [(128, 64, 16), (128, 16, 16), (128, 4, 4), (384, 16, 8)])
def test_a_step_has_2048_tokens_or_as_many_as_the_configs(T: int, rows: int, least: int):
    target = with_fields(TARGET, data={"segment_length": T}, train={"batch_size": rows, "accumulation_steps": 1})
    of_rungs = [rung.fields["train.batch_size"] for rung in make_rungs(target, 5, 10, 2)]
    assert min(of_rungs) == of_rungs[0] == least
    # Other than by halves, the rows of all rungs would have few common divisors, and so few streams.
    assert all(math.log2(rows / of_rung).is_integer() for of_rung in of_rungs)


def test_groups_with_a_rate_of_their_own_follow_as_well_and_keep_the_rest():
    groups = {"embedding": {"learning_rate": 2e-2, "beta2": 0.99}, "vector": {"weight_decay": 0}}
    for rung in make_rungs(with_fields(TARGET, optimizer={"groups": groups}), 5, 10, 2):
        factor = (rung.N / size_of(TARGET)) ** (-1 / 3)
        of_rung = json.loads(rung.fields["optimizer.groups"])
        assert of_rung["embedding"].pop("learning_rate") == pytest.approx(2e-2 * factor, rel=1e-3)
        assert of_rung == {"embedding": {"beta2": 0.99}, "vector": {"weight_decay": 0}}


@pytest.mark.parametrize("base_layers", [None, 3])
def test_with_mup_all_rungs_have_the_configs_rate_and_its_base_model(base_layers: int | None):
    mup = {"parametrization": "mup", "base_dim": 192, "base_layers": base_layers, "tie_embeddings": False}
    target = with_fields(TARGET, model=mup)
    models, products = [target.model], set()
    for rung in make_rungs(target, 5, 10, 2):
        assert rung.fields["optimizer.learning_rate"] == 1e-3
        models.append(model_of(target, rung))
    for model in models:
        assert (model.base_dim, model.base_layers or model.num_layers) == (192, base_layers or 12)
        rate = parameter_settings(dataclasses.replace(target, model=model).resolved(4096))["blocks.feedforward.down"]
        products.add(round(rate.learning_rate * model.model_dim * model.num_layers, 9))
    # By mup's own rule, whatever the rung: at both sizes of the base the rate is the given one.
    assert products == {round(1e-3 * 192 * (base_layers or 12), 9)}


def test_lengths_are_a_series_up_to_the_configs_tokens_a_parameter():
    tokens = 10_000 * 64 * TARGET.data.segment_length
    for rung in make_rungs(TARGET, 5, 10, 2, least_steps=1):
        lengths = [end * rung.step_tokens for _, end in rung.branches]
        assert len(lengths) == POINTS
        assert lengths[-1] / rung.N == pytest.approx(2 * tokens / size_of(TARGET), rel=0.02)
        for place, (begin, end) in enumerate(rung.branches):
            assert begin == rung.branches[0][0] * 2**place
            assert (end - begin) / end == pytest.approx(0.25, abs=0.01)
        # The trunk saves where a branch begins.
        every = rung.fields["checkpoint.every_steps"]
        assert all(begin % every == 0 for begin, _ in rung.branches)
        assert every <= TARGET.checkpoint.every_steps
        assert rung.steps == rung.trunk_steps + sum(end - begin for begin, end in rung.branches)
        assert 0 < rung.fields["optimizer.warmup_steps"] <= rung.branches[0][0] // 2


def test_the_shortest_run_of_a_rung_has_the_least_steps():
    for of, least in ((make_rungs(TARGET, 5, 10, 2), LEAST_STEPS), (make_rungs(TARGET, 5, 10, 2, 1, 4000), 4000)):
        plain = make_rungs(TARGET, 5, 10, 2, least_steps=1)
        for rung, before in zip(of, plain, strict=True):
            shortest = max(before.branches[0][1], least)
            assert rung.branches[0][1] == pytest.approx(shortest, rel=0.02)
            assert rung.branches[-1][1] == pytest.approx(shortest * 2 ** (POINTS - 1), rel=0.02)
            assert {**rung.fields, "checkpoint.every_steps": 0, "optimizer.warmup_steps": 0} == (
                {**before.fields, "checkpoint.every_steps": 0, "optimizer.warmup_steps": 0}
            )
        assert any(before.branches[0][1] < least for before in plain)


def test_what_a_config_gives_itself_fits_its_rungs():
    config = with_fields(TARGET, data={"num_streams": 64}, train={"batch_ramp_start": 16, "batch_ramp_steps": 100})
    rungs = make_rungs(config, 5, 10, 2, least_rows=8)
    for rung in rungs:
        rows = rung.fields["train.batch_size"]
        assert rows % 8 == 0
        assert rows % rung.fields["data.num_streams"] == 0
        assert rung.fields["data.num_streams"] == rungs[0].fields["data.num_streams"]
        assert 64 % rung.fields["data.num_streams"] == 0
        assert rung.fields["train.batch_ramp_start"] is None


def test_given_widths_shrink_and_kinds_of_layers_stay():
    experts = {
        "num_experts": 8,
        "dense_layers": 2,
        "feedforward_dim": 2048,
        "expert_dim": 512,
        "shared_expert_dim": 256,
    }
    mixed = with_fields(TARGET, model={**experts, "sliding_window": 64, "layer_pattern": "SSF"})
    for rung in make_rungs(mixed, 5, 10, 2):
        model = model_of(mixed, rung)
        width = model.model_dim / 768
        assert model.num_experts == 8
        assert model.num_layers % 3 == 0
        assert 1 <= model.dense_layers <= 2
        for name in ("feedforward_dim", "expert_dim", "shared_expert_dim"):
            assert getattr(model, name) == pytest.approx(getattr(mixed.model, name) * width, abs=8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": {"num_heads": 2, "num_kv_heads": 1, "num_layers": 2}}, "shrinks to no 5 sizes"),
        ({"model": {"vocab_size": 2**20}}, r"--rungs=5 --scale=10: .* or give a larger config or a smaller vocabulary"),
        ({"optimizer": {"decay_fraction": 0.0}}, "optimizer.decay_fraction = 0: .* above 0 and up to 0.9"),
        ({"optimizer": {"decay_fraction": 1.0}}, "optimizer.decay_fraction = 1"),
    ],
)
def test_a_config_without_such_a_family_is_refused(fields: dict, words: str):
    with pytest.raises(InputError, match=words):
        make_rungs(with_fields(TARGET, **fields), 5, 10, 2)


def test_fewer_rungs_are_named_where_they_are_possible():
    config = load_config("gpt2_124m", {})
    assert len(make_rungs(config, 5, 10, 2)) == 5
    with pytest.raises(InputError, match=r"--rungs=9 --scale=10: .*; ([5-8]) are possible; lower --rungs"):
        make_rungs(config, 9, 10, 2)
    assert LEAST_SIZES <= 5
