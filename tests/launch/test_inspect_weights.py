"""`ziggurat inspect weights`: what each setting means, and logits against Transformers and other folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.model.interchange.test_families import foreign
from tests.peers import require
from train.weights import compare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    foreign("gemma3_text", {"head_dim": 16, "sliding_window": 5, "layer_types": LAYERS}, tmp_path / "model")
    return tmp_path / "model"


LAYERS = ["sliding_attention", "full_attention"]


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_each_setting_has_a_meaning_and_the_logits_are_those_of_transformers(folder: Path, capsys):
    edit(folder, my_own_key=3)
    assert main(["inspect", "weights", str(folder)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for key, meaning in {
        "layer_types": "model.layer_pattern = SF",
        "hidden_size": "model.model_dim = 32",
        "sliding_window": "model.sliding_window = 5",
        "query_pre_attn_scalar": "the default of the class",
        "use_cache": "no effect on logits",
        "my_own_key": "not a setting of this class",
        "Gemma3ForCausalLM:": "each in its place",
        "the": "the same: the largest difference is",
    }.items():
        assert meaning in lines[key]


def test_weights_whose_names_and_shapes_are_right_but_not_their_places_are_found(folder: Path, tmp_path: Path, capsys):
    numpy = require("safetensors.numpy")
    other = tmp_path / "other"
    other.mkdir()
    tensors = numpy.load_file(folder / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    numpy.save_file(tensors | {gate: tensors[up], up: tensors[gate]}, other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    assert main(["inspect", "weights", str(other)]) == 0
    capsys.readouterr()
    assert main(["inspect", "weights", str(other), f"--against={folder}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert max(position["largest"] for position in found["positions"]) > 1e-2


def test_without_transformers_the_settings_are_shown_and_folders_are_compared_here(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "has_transformers", lambda: False)
    assert main(["inspect", "weights", str(folder)]) == 0
    assert "Transformers is not installed: logits were not compared" in capsys.readouterr().out
    assert main(["inspect", "weights", str(folder), f"--against={folder}"]) == 0
    assert "by this decoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "what can be read is GemmaForCausalLM"),
        ({"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0; in this decoder it is None"),
        ({"hidden_activation": "tanh"}, "hidden_activation is 'tanh'"),
        ({"intermediate_size": 40}, "has the shape (48, 32); the config wants (40, 32)"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, capsys, changes: dict, words: str):
    edit(folder, **changes)
    assert main(["inspect", "weights", str(folder)]) == 2
    found = capsys.readouterr()
    assert words in found.err
    (key,) = changes
    if key not in ("architectures", "intermediate_size"):
        assert "refused: " in next(line for line in found.out.splitlines() if line.startswith(key))


def test_models_with_other_vocabularies_are_not_compared(folder: Path, tmp_path: Path, capsys):
    foreign("qwen2", {"vocab_size": 61}, tmp_path / "other")
    assert main(["inspect", "weights", str(folder), f"--against={tmp_path / 'other'}"]) == 2
    assert "their vocabularies have 60 and 61 tokens" in capsys.readouterr().err
