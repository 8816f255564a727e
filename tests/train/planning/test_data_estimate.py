"""Whether a run has an end that its schedules need, with settings by group of parameters."""

import dataclasses

import pytest

from model.config import ModelConfig
from train.config.config import Config
from train.config.optimizer_config import OptimizerConfig
from train.planning.data_estimate import DataEstimate, has_end

ENDLESS = {"schedule": "inverse_sqrt", "warmup_steps": 1}
EVERY = ("embedding", "position", "matrix", "router", "unembedding", "vector")


def config_with(model: dict | None = None, **optimizer: object) -> Config:
    config = Config(
        model=ModelConfig(vocab_size=300, tie_embeddings=False, **(model or {})), optimizer=OptimizerConfig(**optimizer)
    )
    return config.resolved()


@pytest.mark.parametrize(
    ("optimizer", "wanted"),
    [
        ({}, True),
        ({"schedule": "wsd"}, True),
        ({"final_fraction": 1.0}, False),
        ({"learning_rate": 0.0}, False),
        (ENDLESS, False),
        # A group falls, or none does any more.
        ({**ENDLESS, "groups": {"embedding": {"schedule": "linear"}}}, True),
        ({**ENDLESS, "groups": {"*.query": {"schedule": "linear", "final_fraction": 1}}}, False),
        ({**ENDLESS, "groups": {"*.query": {"schedule": "linear"}, "*.quer*": {"learning_rate": 0}}}, False),
        ({"learning_rate": 0.0, "groups": {"vector": {"learning_rate": 0.1}}}, True),
        ({"groups": dict.fromkeys(EVERY, ENDLESS)}, False),
        # So with weight decay of a schedule of its own, of what decays.
        ({**ENDLESS, "weight_decay_schedule": "linear"}, True),
        ({**ENDLESS, "weight_decay_schedule": "cosine", "weight_decay": 0.0}, False),
        ({**ENDLESS, "weight_decay_schedule": "corrected"}, False),
        ({**ENDLESS, "groups": {"matrix": {"weight_decay_schedule": "cosine"}}}, True),
        ({**ENDLESS, "groups": {"vector": {"weight_decay_schedule": "cosine"}}}, False),
    ],
    ids=str,
)
def test_a_run_has_an_end_if_any_rate_or_decay_falls_to_its_last_step(optimizer: dict, wanted: bool):
    assert has_end(config_with(**optimizer)) == wanted


def test_a_buffer_that_no_optimizer_updates_has_no_schedule():
    experts = {"num_experts": 4, "expert_dim": 32, "balance_bias": True}
    assert has_end(config_with(experts))
    assert not has_end(config_with(experts, groups=dict.fromkeys(EVERY, ENDLESS)))


def test_an_early_end_of_the_corpus_is_said_where_a_schedule_needs_the_rest():
    def lines(last_step: int, **optimizer: object) -> list[str]:
        config = config_with(**optimizer)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=100))
        return DataEstimate({}, last_step).warnings(config)

    assert lines(96) == lines(50, **ENDLESS) == []
    [line] = lines(50)
    assert "near step 50 of 100, before its learning rate has fallen; give --config.train.num_steps=50" in line
    [line] = lines(50, **ENDLESS, groups={"matrix": {"schedule": "wsd"}})
    assert "near step 50 of 100, before its schedules have ended; give --config.train.num_steps=50" in line
