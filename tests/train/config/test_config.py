"""Settings: where values come from, and that everything wrong with them is said at once."""

import argparse
import dataclasses
import json
import re
import time

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data.errors import InputError
from launch.presets import add_config_arguments
from settings import bounds_text, default_of
from train.config.config import Config, config_fields, to_json
from train.config.reading import make_config


def problems(values: dict, overrides: dict | None = None) -> list[str]:
    with pytest.raises(InputError) as caught:
        make_config(values, overrides)
    return str(caught.value).splitlines()


def test_overrides_win_and_are_read_by_the_type_of_their_field():
    config = make_config(
        {"model": {"num_layers": 3, "num_heads": 8}, "optimizer": {"learning_rate": 1}},
        {
            "model.num_layers": "12",
            "optimizer.clip_norm": "0.5",
            "optimizer.warmup_steps": "1e2",
            "model.head_dim": "none",
            "train.tensorboard": "True",
            "train.run_dir": "runs/7",
        },
    )
    assert (config.model.num_layers, config.model.num_heads, config.model.head_dim) == (12, 8, None)
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (1.0, 0.5)
    assert config.optimizer.warmup_steps == 100
    assert config.train.tensorboard is True
    assert config.train.run_dir == "runs/7"


def test_everything_wrong_is_reported_at_once_with_the_nearest_name():
    found = problems(
        {"modle": {}, "data": 3, "model": {"num_layer": 2, "num_heads": "four"}},
        {"train.batchsize": "4", "train.num_steps": "1.5", "optimizer.schedule": "steps", "train.tensorboard": "yes"},
    )
    text = "\n".join(found)
    assert len(found) == 8
    for words in (
        "modle: there is no such group; did you mean model?",
        "data is 3; it must hold fields",
        "model.num_layer: there is no such field; did you mean model.num_layers?",
        "model.num_heads is 'four'; it must be a whole number",
        "train.batchsize: there is no such field; did you mean train.batch_size?",
        "train.num_steps is '1.5'; it must be a whole number",
        "optimizer.schedule is 'steps'; it must be one of cosine, linear, wsd, inverse_sqrt",
        "train.tensorboard is 'yes'; it must be true or false",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"batch_size": 12}, "data": {"num_streams": 5}}, "nearest that does: 4"),
        ({"train": {"batch_size": 6, "accumulation_steps": 4}}, "does not divide by train.accumulation_steps = 4"),
        (
            {"optimizer": {"warmup_steps": 100}, "train": {"num_steps": 100}},
            "optimizer.warmup_steps = 100 leave none of train.num_steps = 100",
        ),
        ({"mesh": {"data": -1}}, "only one of mesh.data, mesh.fsdp, mesh.context and mesh.tensor can be -1"),
        ({"mesh": {"tensor": 0}}, "mesh.tensor is 0"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate is -1.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "it must be a finite number"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 is 1.0"),
        ({"tokenizer": {"vocab_size": 100}}, "from 320 to 16777216"),
        ({"data": {"validation_fraction": 1.0}}, "it must be in [0, 1)"),
        ({"data": {"corpus": ""}}, "data.corpus is empty"),
        ({"evaluation": {"loop_bytes": 2**21}}, "more than evaluation.max_bytes"),
        ({"evaluation": {"loop_bytes": 3}}, "evaluation.loop_bytes is 3; it must be from 4 to"),
        ({"evaluation": {"prompt": "\ud800"}}, "evaluation.prompt is not valid UTF-8"),
        ({"train": {"seed": 2**32}}, "train.seed is 4294967296; it must be from 0 to 4294967295"),
        (
            {"train": {"batch_size": 24, "batch_ramp_start": 5, "batch_ramp_steps": 9}},
            "train.batch_size = 24 is not train.batch_ramp_start = 5 times a power of two; nearest start that works: 6",
        ),
        (
            {"train": {"batch_ramp_start": 4}},
            "train.batch_ramp_start and train.batch_ramp_steps go together: give both or neither",
        ),
        (
            {"train": {"batch_size": 16, "batch_ramp_start": 2, "batch_ramp_steps": 2}},
            "train.batch_ramp_steps is 2; it must be from 3, the doublings of the batch, to train.num_steps = 1000",
        ),
        (
            {"train": {"batch_size": 16, "batch_ramp_start": 8, "batch_ramp_steps": 2000}},
            "train.batch_ramp_steps is 2000",
        ),
        ({"train": {"batch_ramp_start": 0, "batch_ramp_steps": 1}}, "train.batch_ramp_start is 0"),
        (
            {"train": {"batch_size": 24, "batch_ramp_start": 3, "batch_ramp_steps": 9, "accumulation_steps": 6}},
            "train.accumulation_steps = 6 does not cut the ramp's 6 rows as it cuts train.batch_size = 24",
        ),
        (
            {"train": {"batch_size": 16, "batch_ramp_start": 4, "batch_ramp_steps": 9}, "data": {"num_streams": 8}},
            "data.num_streams = 8 does not divide train.batch_ramp_start = 4; nearest that does: 4",
        ),
        (
            {"train": {"profile_steps": (5, 2)}},
            "train.profile_steps is (5, 2); it must be a first and a last step from 1 to train.num_steps = 1000",
        ),
        ({"train": {"profile_steps": (0, 2)}}, "train.profile_steps is (0, 2)"),
        ({"train": {"profile_steps": (9, 12), "num_steps": 11}}, "train.profile_steps is (9, 12)"),
        (
            {"train": {"profile_steps": (1, 2, 3)}},
            "train.profile_steps is (1, 2, 3); it must be two whole numbers, as in (5,8), or none",
        ),
        ({"train": {"profile_steps": [1, 2.0]}}, "it must be two whole numbers"),
        ({"train": {"profile_steps": 5}}, "it must be two whole numbers"),
        ({"train": {"watch_every_steps": -1}}, "train.watch_every_steps is -1; it must be at least 0"),
        ({"train": {"ema_decay": 1.0}}, "train.ema_decay is 1.0; it must be in [0, 1)"),
        (
            {"optimizer": {"decay_fraction": 0.5}},
            "optimizer.decay_fraction has no effect with the schedule cosine; leave it at 0.2",
        ),
        (
            {"optimizer": {"schedule": "inverse_sqrt", "final_fraction": 0.0}},
            "optimizer.final_fraction has no effect with the schedule inverse_sqrt; leave it at 0.1",
        ),
        ({"optimizer": {"schedule": "inverse_sqrt", "warmup_steps": 0}}, "give optimizer.warmup_steps"),
        (
            {"optimizer": {"schedule": "inverse_sqrt"}, "train": {"num_steps": 19}},
            "give optimizer.warmup_steps",
        ),
        ({"optimizer": {"name": "adam"}}, "it must be one of adamw, lion, adafactor, muon"),
        ({"optimizer": {"muon_momentum": 0.9}}, "optimizer.muon_momentum has no effect with adamw; leave it at 0.95"),
        ({"optimizer": {"name": "lion", "epsilon": 1e-6}}, "optimizer.epsilon has no effect with lion"),
        ({"optimizer": {"name": "adafactor", "beta2": 0.99}}, "optimizer.beta2 has no effect with adafactor"),
        ({"optimizer": {"name": "muon", "muon_momentum": 1.0}}, "optimizer.muon_momentum is 1.0; it must be in [0, 1)"),
        ({"optimizer": {"moment_dtype": "float16"}}, "it must be one of float32, bfloat16"),
        (
            {"optimizer": {"moment_dtype": "bfloat16", "beta2": 0.999}},
            "give at most 0.9961, or optimizer.moment_dtype=float32",
        ),
        (
            {"optimizer": {"moment_dtype": "bfloat16", "name": "adafactor"}, "train": {"num_steps": 1025}},
            "adafactor's decay grows beyond 0.9961 in train.num_steps = 1025",
        ),
        ({"train": {"run_dir": ""}}, "train.run_dir is empty"),
        (
            {"data": {"fim_rate": 0.5, "fim_tokens": "<P>,<S>,<M>"}},
            "is for another's tokenizer",
        ),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep is 0"),
        ({"model": {"num_layers": True}}, "it must be a whole number"),
        ({3: {}}, "3: there is no such group"),
        ({"train": {3: 4}}, "train.3: there is no such field"),
        ({"recovery": {"skips": {"²": 1}}}, "'²': 1 is not a step"),
        ({"recovery": {"skips": {"1": True}}}, "'1': True is not a step"),
        ({"recovery": {"skips": {"1": 10**11}}}, "is not a step and a number of batches up to 1,000,000"),
    ],
)
def test_impossible_values_and_combinations_are_named(values: dict, words: str):
    assert any(words in problem for problem in problems(values))


def test_no_number_is_too_large_for_an_answer_at_once():
    """Every whole number has an upper limit, and the checks do not count up to what is given."""
    numbers = [(group, name) for group, name, field in config_fields() if "int" in str(field.type)]
    assert len(numbers) > 40
    for size in (2**24, 10**13, 10**308, 10**5000):
        values: dict = {group: {} for group, _ in numbers}
        for group, name in numbers:
            values[group][name] = size
        values["data"]["num_streams"] = 7
        begun = time.monotonic()
        found = problems(values)
        assert time.monotonic() - begun < 1
        assert size == 2**24 or len(found) >= len(numbers) - 1


@given(st.sampled_from([(g, n) for g, n, f in config_fields() if "str" in str(f.type) or "dict" in str(f.type)]),
       st.text(), st.sampled_from(["\0", "\ud800", "\udcff"]), st.booleans())  # fmt: skip
def test_a_text_anywhere_in_a_config_is_one_that_can_be_a_name(field, text, bad, is_key):
    group, name = field
    kinds = next(str(f.type) for g, n, f in config_fields() if (g, n) == field)
    value = f"{text}{bad}" if "str" in kinds and "dict[" not in kinds else {"a": {f"x{bad}": 1} if is_key else [bad]}
    if bad == "\0" and name in ("text_separator", "prompt"):
        make_config({group: {name: "\0"}})
    else:
        assert any("NUL character" in line or "not valid UTF-8" in line for line in problems({group: {name: value}}))


def nested_lists(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [17, 500, 100_000])
def test_what_is_nested_deeply_is_refused_from_a_flag_and_from_a_file(depth: int):
    for values, flags in (
        ({"mesh": {"rules": {"a": nested_lists(depth)}}}, {}),
        ({}, {"mesh.rules": '{"a":' + "[" * depth + "]" * depth + "}"}),
    ):
        (problem,) = problems(values, flags)
        assert problem.startswith("mesh.rules is ")
        assert problem.endswith(("; it must be nested at most 16 levels deep", ": nested too deeply"))
        assert len(problem) < 300


def test_two_values_of_one_name_and_numbers_of_many_digits_in_a_flag_are_named():
    for text, words in (
        ('{"a": ["fsdp"], "a": []}', "'a' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (f'{{"a": {"9" * 5000}}}', "JSON where it begins with {"),
        (f'{{"a": {"9" * 4000}}}', "a number of at most 1024 bits"),
    ):
        (problem,) = problems({}, {"mesh.rules": text})
        assert words in problem


@pytest.mark.parametrize("text", ["5,8", "(5,8)", "(5, 8)", " 5 , 8 "])
def test_a_pair_is_read_from_a_flag_a_tuple_and_a_list(text: str):
    config = make_config({}, {"train.profile_steps": text})
    assert config.train.profile_steps == (5, 8)
    for value in ((5, 8), [5, 8]):
        assert make_config(ConfigDict({"train": {"profile_steps": value}}).to_dict()) == config
    assert make_config(json.loads(to_json(config))) == config
    assert make_config({"train": {"profile_steps": [1, 2]}}, {"train.profile_steps": "none"}) == Config()


@pytest.mark.parametrize("text", ["5", "5,8,9", "(5,8", "5,8)", "5.0,8", "a,b", "", "()"])
def test_what_is_no_pair_is_named(text: str):
    assert problems({}, {"train.profile_steps": text}) == [
        f"train.profile_steps is {text!r}; it must be two whole numbers, as in (5,8), or none"
    ]


def test_streams_are_the_rows_of_the_first_batch_unless_given():
    ramp = {"train": {"batch_size": 16, "batch_ramp_start": 4, "batch_ramp_steps": 9}}
    assert make_config({"train": {"batch_size": 16}}).resolved().data.num_streams == 16
    assert make_config(ramp).resolved().data.num_streams == 4
    assert make_config(ramp | {"data": {"num_streams": 2}}).resolved().data.num_streams == 2


def test_a_saved_config_is_read_back_equal():
    config = make_config({"model": {"head_dim": 8}, "data": {"num_streams": 4}})
    assert make_config(json.loads(to_json(config))) == config


def test_every_field_has_help_a_resume_rule_and_a_default_in_words():
    for group, name, field in config_fields():
        assert len(field.metadata["help"]) > 10, (group, name)
        assert field.metadata["resume"] in ("frozen", "warn", "free")
        assert bool(field.metadata["unset"]) == (field.default is None), (group, name)


def outside(field: dataclasses.Field) -> list[object]:
    """Values just outside the bounds and choices of a field."""
    bounds = field.metadata["bounds"]
    step = 1 if "int" in str(field.type) else 1e-9
    values = [
        bounds[name] + change for name, change in (("at_least", -step), ("at_most", step)) if bounds[name] is not None
    ]
    values += [bounds[name] for name in ("above", "below") if bounds[name] is not None]
    return [*values, "no such choice"] if field.metadata["choices"] else values


def test_every_bound_and_choice_of_the_table_is_enforced_and_named():
    checked = 0
    for group, name, field in config_fields():
        for value in outside(field):
            value = float(value) if field.type in ("float", float) else value
            stated = ", ".join(field.metadata["choices"]) or bounds_text(field)
            named = [
                problem for problem in problems({group: {name: value}}) if problem.startswith(f"{group}.{name} is ")
            ]
            assert any(problem.endswith(stated) for problem in named), (group, name, value, named)
            checked += 1
    assert checked > 80


def test_help_shows_every_field_with_its_default():
    parser = argparse.ArgumentParser(usage="")
    add_config_arguments(parser)
    entries = re.split(r"\n  (?=--config)", parser.format_help())
    shown = {entry.split()[0].removeprefix("--config."): " ".join(entry.split()) for entry in entries}
    for group, name, field in config_fields():
        default = field.metadata["unset"] or default_of(field)
        default = str(default).lower() if isinstance(default, bool) else default
        assert f"(default: {default})" in shown[f"{group}.{name}"]


def test_what_bfloat16_moments_can_follow_is_accepted_and_what_they_cannot_is_refused():
    # A moment of one, over and over times a decay, stored in bfloat16: it falls, or stays where it is.
    falls = {}
    for decay in (0.95, 0.99, 0.996, 0.9965, 0.999):
        stored = [jnp.asarray(1.9921875, jnp.bfloat16)]
        for _ in range(400):
            stored.append((stored[-1].astype(jnp.float32) * decay).astype(jnp.bfloat16))
        falls[decay] = float(stored[-1]) < 1
        config = {"optimizer": {"moment_dtype": "bfloat16", "beta2": decay}}
        if falls[decay]:
            make_config(config)
        else:
            assert len(problems(config)) == 1
    assert list(falls.values()) == [True, True, True, False, False]
