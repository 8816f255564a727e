"""The end of a run in plain words, and the commands that it names."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch.commands import parse
from launch.presets import load_config
from launch.summary import summary, what_it_learned
from tests.launch.small_run import metrics
from train.run.folder import Run

EVALUATED = {"validation_bits_per_byte": 1.9, "validation_accuracy": 0.3, "validation_tokens": 500}
WHOLE = EVALUATED | {"held_out_bits_per_byte": 1.722, "held_out_accuracy": 0.468, "held_out_tokens": 272_173}


def test_what_a_run_learned_is_compared_with_a_compressor():
    assert what_it_learned(WHOLE, 1.899, 4096)[1:] == [
        "  with its predictions a byte takes 1.72 bits instead of 8 (gzip -9: 1.90);",
        "  it knows such text better than that compressor does",
        "  its first guess, out of 4,096 tokens, was right in 47% of 272,173 places",
    ]
    assert "the compressor still does better" in what_it_learned(EVALUATED, 1.9, 4096)[2]
    older = {name: value for name, value in WHOLE.items() if "accuracy" not in name}
    assert len(what_it_learned(older, 1.899, 4096)) == 3


def test_each_command_at_the_end_is_one_that_exists_with_flags_that_exist(finished: Path):
    commands = re.findall(r"^  ziggurat (.*)", summary(Run(finished), "ziggurat"), re.MULTILINE)
    words = [shlex.split(command) for command in commands]
    assert [word[0] for word in words] == ["generate", "report", "pretrain", "plan"]
    configs = []
    for command in words:
        _, arguments = parse(command)
        if command[0] in ("pretrain", "plan"):
            configs.append(load_config(arguments.config, arguments.overrides))
    own, bigger = configs
    before = Run(finished).load_config()
    assert (own.data.corpus, own.train.run_dir) == ("TEXT", "FOLDER")
    assert own.model.num_layers == before.model.num_layers
    assert bigger.model.num_layers == 2 * before.model.num_layers


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        ({}, "learning rate   still 67% of its peak; a run of --config.train.num_steps=6 lets it fall"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 1}, None),
        ({"schedule": "inverse_sqrt", "warmup_steps": 1, "groups": {"matrix": {"schedule": "linear"}}},
         "schedule        the rate or decay of some parameters has not come to its end; a run of"),
        ({"learning_rate": 0.0, "groups": {"embedding": {"learning_rate": 0.1}}}, "schedule        the rate or decay"),
    ],
)  # fmt: skip
def test_a_run_that_ends_before_a_schedule_does_says_which(
    finished: Path, tmp_path: Path, optimizer: dict, line: str | None
):
    run = Run(shutil.copytree(finished, tmp_path / "run"))
    early = [json.dumps(record | {"learning_rate": 0.0067}) + "\n" for record in metrics(finished)[:6]]
    run.metrics.write_text("".join(early))
    config = run.load_config()
    run.save_config(replace(config, optimizer=replace(config.optimizer, **optimizer)))
    said = [text for text in summary(run, "ziggurat").splitlines() if "lets it fall" in text]
    assert len(said) == (line is not None)
    assert all(text.startswith(line or "") for text in said)
