"""Experiments as files: what they mean, and that whatever is wrong with one is said at once, with its line."""

from pathlib import Path

import pytest

from data.errors import InputError
from launch.experiment import read_experiment, text_of
from tests.benchmarks import learning
from tests.launch.small_run import write_config
from train.config.config import config_fields
from train.config.reading import parse_text, types_of

GOOD = """
config = "CONFIG"
seeds = [3, 1]

[shared]
model.num_layers = 1

[variants.plain]

[variants.fast]
optimizer.learning_rate = 2e-2
"optimizer.schedule" = "wsd"
evaluation = { prompt = "a = [1, 2]", every_steps = 3 }
"""


def write(folder: Path, text: str) -> Path:
    """An experiment, with a good config's path for CONFIG."""
    file = folder / "experiment.toml"
    file.write_text(text.replace("CONFIG", str(write_config(folder))))
    return file


def problems(folder: Path, text: str) -> list[str]:
    """The problems of an experiment, without the path of its file."""
    file = write(folder, text)
    with pytest.raises(InputError) as error:
        read_experiment(file)
    return [line.removeprefix(f"{file}:") for line in str(error.value).splitlines()]


def test_an_experiment_is_a_config_with_variants(tmp_path: Path):
    experiment = read_experiment(write(tmp_path, GOOD))
    assert experiment.seeds == (3, 1)
    assert experiment.baseline == "plain"
    assert experiment.equal == "tokens"
    plain, fast = experiment.configs["plain"], experiment.configs["fast"]
    assert plain.model.num_layers == fast.model.num_layers == 1
    assert (plain.optimizer.learning_rate, fast.optimizer.learning_rate) == (1e-2, 2e-2)
    assert (plain.optimizer.schedule, fast.optimizer.schedule) == ("cosine", "wsd")
    assert (fast.evaluation.prompt, fast.evaluation.every_steps) == ("a = [1, 2]", 3)
    assert not plain.checkpoint.export


def test_a_variant_may_change_what_all_share(tmp_path: Path):
    text = GOOD.replace("[variants.fast]\n", "[variants.fast]\nmodel.num_layers = 2\ncheckpoint.export = true\n")
    fast = read_experiment(write(tmp_path, text)).configs["fast"]
    assert fast.model.num_layers == 2
    assert fast.checkpoint.export


@pytest.mark.parametrize(
    ("name", "value", "means"),
    [
        ("train.num_steps", 12, 12), ("optimizer.learning_rate", 0.1, 0.1), ("model.qk_norm", True, True),
        ("train.profile_steps", [5, 8], (5, 8)), ("optimizer.warmup_steps", "none", None),
        ("data.corpus", {"a": {"corpus": "x", "weight": 2}}, {"a": {"corpus": "x", "weight": 2}}),
        ("data.corpus", "päth", "päth"), ("mesh.rules", {"vocabulary": []}, {"vocabulary": []}),
    ],
)  # fmt: skip
def test_values_of_toml_mean_what_flags_mean(name: str, value: object, means: object):
    field = next(field for group, field_name, field in config_fields() if f"{group}.{field_name}" == name)
    assert parse_text(text_of(value), types_of(field)) == means


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path):
    text = """config = "CONFIG"
seeds = [0, 0]
baseline = "plian"
equals = "tokens"

[shared]
optimizer.beta1 = 2

[variants.plain]
optimizer.name = "adamww"
"optimizer.schedule" = "cosin"
train.seed = 3

[variants.fast]
optimizer = { name = "muon", muon_momentum = -1 }
learning_rate = 3
"""
    found = problems(tmp_path, text)
    expected = [
        "2: seeds has a number twice", "3: baseline is 'plian'; it must be one of the variants: plain, fast",
        "4: equals: there is no such key; did you mean equal?", "7: optimizer.beta1 is 2.0; it must be in [0, 1)",
        "10: variant plain: optimizer.name is 'adamww'", "11: variant plain: optimizer.schedule is 'cosin'",
        "12: train.seed cannot be set: seeds = [...] sets it", "15: variant fast: optimizer.muon_momentum is -1.0",
        "16: variant fast: learning_rate: there is no such field; did you mean optimizer.learning_rate?",
    ]  # fmt: skip
    assert len(found) == len(expected), found
    for line, words in zip(found, expected, strict=True):
        assert line.startswith(words)


TABLE = [
    ("", ["1: config: name a preset, a file or a run", "1: there is no variant"]),
    ('config = "tinny"\n[variants.a]', ["1: config=tinny: no preset, run or file", ]),
    ("config = 5\n[variants.a]", ["1: config: name a preset, a file or a run"]),
    ('config = "small"\n[variants.a]\n[variants.b]', ["data.corpus is not given"]),
    ('config = "CONFIG"\nseeds = 3\n[variants.a]', ["2: seeds must be a list of whole numbers"]),
    ('config = "CONFIG"\nseeds = []\n[variants.a]', ["2: seeds must be a list of whole numbers"]),
    ('config = "CONFIG"\nseeds = [true]\n[variants.a]', ["2: seeds must be a list of whole numbers"]),
    ('config = "CONFIG"\nequal = "flops"\n[variants.a]', ["2: equal is 'flops'; it must be one of tokens, time"]),
    ('config = "CONFIG"\n[variants]\na = 3', ["3: 3 is no table of fields"]),
    ('config = "CONFIG"\nvariants = 3', ["2: there is no variant"]),
    ('config = "CONFIG"\n[variants."../a"]', ["2: variant ../a: a name begins with a letter or digit"]),
    ('config = "CONFIG"\nshared = 1\n[variants.a]', ["2: 1 is no table of fields"]),
    ('config = "CONFIG"\n[shared]\ncheckpoint.dir = "x"\n[variants.a]', ["3: checkpoint.dir cannot be set"]),
    ('config = "CONFIG"\n[shared]\nmodel.reward_head = true\nobjective.name = "reward"\ndata.rejected_field = "other"\n'
     'data.segmentation = "pack"\nevaluation.sample_tokens = 64\n[variants.a]\n[variants.b]',
     ["3: model.reward_head: a reward model has no bits a byte to compare"]),
    ('config = "CONFIG"\n[shared]\ndata.validation_fraction = 0\n[variants.a]\n[variants.b]',
     ["3: data.validation_fraction is 0, so there is no text to compare on"]),
    ('config = "CONFIG"\n[variants.a]\n[variants.b]\ntrain.num_steps = 10',
     ["4: variant b: it reads 2,560 tokens and a 3,072; set train.num_steps so"]),
    ('config = "CONFIG"\nequal = "time"\n[variants.a]\n[variants.b]\ntrain.num_steps = 10',
     ['5: variant b: train.num_steps follows from equal = "time"']),
    ('config = "CONFIG"\n[variants.a]\noptimizer.name = "muon"\n"optimizer.name" = "lion"',
     ["4: optimizer.name is there twice"]),
    ("config = ", ["1: no TOML: Invalid value"]),
    ('config = "CONFIG"\nseeds = [1,\n2', ["3: no TOML: "]),
    ('config = "CONFIG"\nconfig = "CONFIG"', ["2: no TOML: Cannot overwrite a value"]),
    (f"a = {'[' * 5000}", ["nested too deeply"]),
    (f"a = {'9' * 5000}", ["no TOML"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), TABLE, ids=range(len(TABLE)))
def test_what_is_no_experiment_is_refused_with_its_line(text: str, words: list[str], tmp_path: Path):
    found = problems(tmp_path, text)
    assert len(found) == len(words), found
    for line, expected in zip(found, words, strict=True):
        assert expected in line


def test_what_a_fork_cannot_take_over_is_said_with_its_line(finished: Path, tmp_path: Path, capsys):
    fork = f'config = "{finished}@8"'
    several = f"""{fork}
seeds = [0, 1, 2]
[shared]
train.num_steps = 16
[variants.plain]
[variants.lion]
optimizer.name = "lion"
[variants.wide]
model.model_dim = 64
[variants.done]
train.num_steps = 8
"""
    found = problems(tmp_path, several.replace("[shared]", 'equal = "nothing"\n[shared]'))
    expected = [
        ("2: variant plain: seeds has 1, but 0 in ", "or train.init_with=optimizer"),
        ("2: variant plain: seeds has 2, but 0 in ", "or train.init_with=optimizer"),
        ("2: variant lion: seeds has 1", ""), ("2: variant lion: seeds has 2", ""),
        ("2: variant wide: seeds has 1", ""), ("2: variant wide: seeds has 2", ""),
        ("8: variant lion: optimizer.name = lion, but adamw in ", "or train.init_with=weights"),
        ("10: variant wide: model.model_dim = 64, but 32 in ", "give the values from before"),
        ("12: variant done: train.num_steps = 8: with train.init_with = all the run has done the 8 steps", ""),
    ]  # fmt: skip
    assert len(found) == len(expected), found
    for line, (begin, end) in zip(found, expected, strict=True):
        assert line.startswith(begin)
        assert line.endswith(end) or not end
    [line] = problems(tmp_path, f'config = "{finished}@7"\n[variants.a]\n[variants.b]')
    assert line.startswith("1: train.init_from")
    assert "it has no checkpoint of step 7" in line
    common = problems(tmp_path, f"{fork}\nseeds = [5]\n[variants.a]\n[variants.b]")
    assert [line.partition(",")[0] for line in common] == ["2: seeds has 5"]
    timed = problems(tmp_path, f'{fork}\nequal = "time"\n[variants.a]')
    assert timed[0].startswith("1: variant a: train.init_with = all counts its parent's steps")
    for good in (f"{fork}\n[variants.a]", several.partition("[variants.lion]")[0].replace("[0, 1, 2]", "[0]"),
                 f'{fork}\nseeds = [1]\nequal = "time"\n[variants.a]\ntrain.init_with = "weights"'):  # fmt: skip
        assert read_experiment(write(tmp_path, good))


def test_a_fork_that_has_begun_needs_its_parent_no_more(finished: Path, tmp_path: Path):
    text = f'config = "{finished}@8"\nseeds = [0, 5]\n[variants.a]'
    (tmp_path / "runs" / "a-5" / "checkpoints" / "9").mkdir(parents=True)
    assert read_experiment(write(tmp_path, text), tmp_path / "runs").seeds == (0, 5)
    with pytest.raises(InputError, match="seeds has 5"):
        read_experiment(write(tmp_path, text))


@pytest.mark.parametrize("size", learning.EXPERIMENTS)
def test_the_benchmark_of_learning_is_an_experiment(size: str):
    experiment = read_experiment(learning.EXPERIMENTS[size])
    assert list(experiment.configs) == [*learning.BASELINES, learning.LONG, learning.SHORT]
    assert experiment.baseline == learning.BASELINES[0]
    configs = experiment.configs.values()
    assert [config.optimizer.name for config in configs] == ["adamw", "adamw", "muon", "muon"]
    assert [config.data.shuffle_rows for config in configs] == [False, True, True, True]
    assert len({(config.model, config.train.batch_size, config.data.segment_length) for config in configs}) == 1
    steps = [config.train.num_steps for config in configs]
    assert steps == [steps[0]] * 3 + [steps[0] * 4 // 9]


def test_the_tokens_for_a_figure_are_interpolated_between_two_lengths():
    bits = {learning.LONG: [1.7], learning.SHORT: [1.9]}
    tokens = {learning.LONG: 400, learning.SHORT: 100}
    assert learning.tokens_for(1.8, bits, tokens, 0) == pytest.approx(200)
    assert learning.tokens_for(1.95, bits, tokens, 0) == 100
