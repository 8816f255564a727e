"""Settings by group of parameters: which parameters have which, and that everything wrong with groups is said."""

import json

import pytest
from ml_collections import ConfigDict

from data.errors import InputError
from train.config.changes import Change, changes_of
from train.config.config import Config, to_json
from train.config.parameter_groups import parameter_settings
from train.config.reading import make_config

EXPERTS = {"num_experts": 4, "expert_dim": 32, "balance_bias": True, "router_bias": True}


def config_with(groups: dict | str, model: dict | None = None, **optimizer: object) -> Config:
    values = {"model": model or {}, "optimizer": {"name": "muon", "groups": groups} | optimizer}
    return make_config(values, {"train.num_steps": "100"})


def problems(groups: dict | str, **optimizer: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        config_with(groups, **optimizer)
    return str(caught.value).splitlines()


def rates(groups: dict | str, **model: object) -> dict[str, float]:
    """The learning rates of all parameters that differ from 1, of a model of all roles."""
    model = {"tie_embeddings": False, "norm": "layernorm", "position": "learned"} | model
    config = config_with(groups, model, learning_rate=1.0).resolved(300)
    return {name: s.learning_rate for name, s in parameter_settings(config).items() if s.learning_rate != 1}


def test_a_role_has_its_parameters_and_the_roles_have_all():
    of = lambda role: set(rates({role: {"learning_rate": 2}}, **EXPERTS, dense_layers=1))
    assert of("embedding") == {"embedding.table"}
    assert of("position") == {"position.table"}
    assert of("unembedding") == {"unembedding.matrix"}
    assert of("router") == {"blocks.experts.router"}
    assert of("matrix") > {"blocks.attention.query", "blocks.feedforward.down", "blocks.experts.gate_up"}
    assert of("vector") > {"norm.scale", "norm.bias", "blocks.attention_norm.scale", "blocks.experts.router_bias"}
    roles = [of(role) for role in ("embedding", "position", "unembedding", "router", "matrix", "vector")]
    everything = set(rates({"*": {"learning_rate": 2}}, **EXPERTS, dense_layers=1))
    assert set.union(*roles) == everything
    assert sum(map(len, roles)) == len(everything)
    # It has no gradient.
    assert "blocks.experts.balance" not in everything


def test_patterns_win_over_roles_and_later_patterns_over_earlier_ones_field_by_field():
    groups = {
        "blocks.attention.*": {"learning_rate": 2, "weight_decay": 0.5},
        "*.query": {"learning_rate": 3},
        "matrix": {"learning_rate": 4, "weight_decay": 0.25, "muon_momentum": 0.5},
    }
    settings = parameter_settings(config_with(groups).resolved(300))
    found = {name: (s.learning_rate, s.weight_decay, s.muon_momentum) for name, s in settings.items()}
    assert found["blocks.attention.query"] == (3, 0.5, 0.5)
    assert found["blocks.attention.key"] == (2, 0.5, 0.5)
    assert found["blocks.feedforward.up"] == (4, 0.25, 0.5)
    assert found["embedding.table"] == (3e-4, 0.1, 0.95)


def test_groups_may_be_json_in_a_preset_too_since_a_config_dict_has_no_dots_and_no_order():
    groups = {"blocks.attention.*": {"learning_rate": 0.5}, "*": {"beta2": 0.5}, "a*": {"beta2": 0.25}}
    with pytest.raises(ValueError, match="dots"):
        ConfigDict({"optimizer": {"groups": groups}})
    text = json.dumps({name: groups[name] for name in ("blocks.attention.*", "*")})
    config = config_with(ConfigDict({"groups": text}).to_dict()["groups"])
    assert config.optimizer.groups == {"blocks.attention.*": {"learning_rate": 0.5}, "*": {"beta2": 0.5}}
    flag = make_config({}, {"optimizer.name": "muon", "optimizer.groups": text, "train.num_steps": "100"})
    assert flag == config == make_config(json.loads(to_json(config)))
    assert list(flag.optimizer.groups) == ["blocks.attention.*", "*"]


def test_everything_wrong_with_groups_is_said_at_once():
    found = problems(
        {
            "embeding": {"learning_rate": 0.1},
            "matrix": {"learning_rat": 0.1, "beta1": 0.8, "momentum": 0.9},
            "blocks.atention.*": {"beta2": 2},
            "unembedding": {"muon_momentum": 0.9, "weight_decay": -1},
            "vector": {"weight_decay": 0.1, "beta1": 0.5},
            "router": {"learning_rate": 0.1},
            "*.query": {"decay_fraction": 0.5, "learning_rate": "fast"},
            "*.key": {},
            "*.value": 3,
        }
    )
    expected = (
        "optimizer.groups['embeding'] has none of the model's parameters; did you mean embedding?",
        "optimizer.groups['matrix']: 'learning_rat' is no setting of a group; did you mean learning_rate?",
        "optimizer.groups['matrix']: 'momentum' is no setting of a group; did you mean muon_momentum?",
        "optimizer.groups['matrix'].beta1 has no effect with muon; leave it out",
        "optimizer.groups['blocks.atention.*'] has none of the model's parameters",
        "optimizer.groups['blocks.atention.*'].beta2 is 2.0; it must be in [0, 1)",
        "optimizer.groups['unembedding'].weight_decay is -1.0; it must be at least 0",
        "optimizer.groups['unembedding'].muon_momentum has no effect with muon; leave it out",
        "optimizer.groups['vector'].weight_decay has no effect with vectors, which do not decay; leave it out",
        "optimizer.groups['router'] has none of the model's parameters",
        "optimizer.groups['*.query'].learning_rate is 'fast'; it must be a number",
        "optimizer.groups['*.query'].decay_fraction has no effect with the schedule cosine; leave it out",
        "optimizer.groups['*.key'] is {}; it must hold settings",
        "optimizer.groups['*.value'] is 3; it must hold settings",
    )
    for words in expected:
        assert sum(line.startswith(words) for line in found) == 1, (words, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("group", "fields", "words"),
    [
        ("matrix", {"beta1": 0.8}, ".beta1 has no effect with muon; leave it out"),
        ("matrix", {"beta2": 0.8}, ".beta2 has no effect with muon; leave it out"),
        ("embedding", {"muon_momentum": 0.8}, ".muon_momentum has no effect with muon; leave it out"),
        ("matrix", {"decay_fraction": 0.5}, ".decay_fraction has no effect with the schedule cosine"),
        ("matrix", {"muon_momentum_warmup_steps": 5}, "has no effect with muon_momentum_start = none"),
        ("matrix", {"weight_decay": 0, "cautious_weight_decay": True}, ".cautious_weight_decay has no effect with"),
        ("*", {"warmup_steps": 100}, ".warmup_steps = 100 leave none of train.num_steps = 100 at the peak"),
        ("*", {"schedule": "inverse_sqrt", "warmup_steps": 0}, "give optimizer.groups['*'].warmup_steps of at least 1"),
        ("*", {"clip_norm": 1.0}, ": 'clip_norm' is no setting of a group"),
        ("*", {"name": "lion"}, ": 'name' is no setting of a group"),
        ("*", {3: 1}, ": 3 is no setting of a group"),
        (3, {"beta1": 0.5}, "optimizer.groups[3]: a group is a role or a pattern of names"),
        ("a\nb", {"beta1": 0.5}, "optimizer.groups['a\\nb'] has none of the model's parameters"),
    ],
)
def test_a_wrong_group_is_named(group: str, fields: dict, words: str):
    assert [words in line for line in problems({group: fields})] == [True]


def test_bfloat16_moments_limit_the_decays_of_groups():
    found = problems({"embedding": {"beta2": 0.999}}, moment_dtype="bfloat16")
    assert len(found) == 1
    assert "optimizer.groups['embedding'].beta2 is 0.999; moments in bfloat16" in found[0]


def test_a_setting_for_some_of_many_parameters_is_right():
    config_with({"*": {"beta2": 0.9, "muon_momentum": 0.9, "weight_decay": 0.5}})
    # The other group makes it useful.
    config_with({"matrix": {"schedule": "wsd"}, "*.query": {"decay_fraction": 0.5}})
    config_with({"matrix": {"schedule": "wsd"}}, decay_fraction=0.5)
    config_with({"matrix": {"weight_decay": 0.5}}, weight_decay=0.0, weight_decay_schedule="linear")
    config_with({"matrix": {"muon_momentum_start": 0.5}}, muon_momentum_warmup_steps=5)


def test_a_wrong_model_or_a_wrong_default_is_said_once_and_groups_are_still_checked():
    with pytest.raises(InputError) as caught:
        config_with({"embedding": {"beta1": 3}, "nothing": {"beta1": 0.5}}, {"num_heads": 0}, beta2=7)
    found = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in found] == [
        "model.num_heads", "optimizer.beta2", "optimizer.groups['embedding'].beta1",
    ]  # fmt: skip


def test_other_groups_on_resume_are_shown_in_a_warning():
    before, now = config_with({}), config_with({"embedding": {"beta1": 0.5}})
    change = Change("optimizer.groups", {}, {"embedding": {"beta1": 0.5}})
    assert changes_of(before, now) == {"frozen": [], "warn": [change], "free": []}


def test_settings_without_groups_are_the_optimizers():
    config = make_config({"optimizer": {"beta1": 0.5}}).resolved(300)
    assert set(map(repr, parameter_settings(config).values())) == {repr(config.optimizer)}
