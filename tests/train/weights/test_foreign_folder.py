"""Folders of weights that other programs have changed: what they say is kept, and what does not fit is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from data.tokenizer.folder import load_tokenizer, write_tokenizer
from data.tokenizer.training import train_tokenizer
from model.interchange.tensors import reader_of
from model.parameters import parameter_table
from model.trees import nested
from tests.data.texts import code
from tests.small import small_model
from train.weights.huggingface import open_huggingface, write_huggingface
from train.weights.safetensors_files import TensorFiles
from train.weights.weight_source import WeightSource

EXTRA_IDS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export whose model has more ids than its tokenizer."""
    tokenizer = train_tokenizer(code()[:10], 600, tmp_path / "tokenizer")
    config = small_model(vocab_size=tokenizer.vocab_size + EXTRA_IDS)
    random = np.random.default_rng(0)
    drawn = {name: random.normal(0, 1, p.shape).astype(np.float32) for name, p in parameter_table(config).items()}
    write_huggingface(tmp_path / "weights", WeightSource(config, 32, tokenizer, reader_of(nested(drawn))))
    return tmp_path / "weights"


def edit(file: Path, **values) -> None:
    """Sets keys of a JSON file."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.mark.parametrize("named", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
def test_tokens_that_were_added_to_any_file_are_found_and_kept(folder, tmp_path, named):
    first = load_tokenizer(folder).vocab_size
    settings = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    if named == "added_tokens.json":
        edit(folder / named, **{"<user>": first, "<bot>": first + 1})
    else:
        tokens = [{"id": first + i, "content": text, **flags} for i, text in enumerate(("<user>", "<bot>"))]
        if named == "tokenizer.json":
            edit(folder / named, added_tokens=[*settings["added_tokens"], *tokens])
        else:
            edit(folder / named, added_tokens_decoder={str(token["id"]): token for token in tokens})
    tokenizer = load_tokenizer(folder)
    copy = write_tokenizer(tokenizer.files(), tmp_path / "copy")
    for one in (tokenizer, copy):
        assert one.encode("<bot><user>").tolist() == [first + 1, first]
    assert copy.fingerprint == tokenizer.fingerprint


def test_ids_beyond_the_vocabulary_are_refused_wherever_weights_are_opened(folder):
    first = load_tokenizer(folder).vocab_size
    edit(folder / "added_tokens.json", **{f"<{i}>": first + i for i in range(EXTRA_IDS + 1)})
    with pytest.raises(InputError, match=f"has {first + EXTRA_IDS + 1} ids, the model {first + EXTRA_IDS}"):
        open_huggingface(folder)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_token_that_ends_a_text_is_kept_through_import_and_export(folder, tmp_path, file):
    (folder / "tokenizer.model").unlink()
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    edit(folder / file, eos_token_id=[1, 71], pad_token_id=5)
    weights = open_huggingface(folder)
    copy = write_tokenizer(weights.tokenizer.files(), tmp_path / "copy")
    assert copy.stop_ids == [1, 71]
    write_huggingface(tmp_path / "again", WeightSource(weights.config, 32, copy, weights.read))
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again["eos_token_id"] == [1, 71]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [1, 71]
    if file == "generation_config.json":
        assert again["pad_token_id"] == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused_by_name(folder, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    path, entry, begin = TensorFiles(folder)._entries[name]
    np.memmap(path, np.float32, "r+", begin + entry["data_offsets"][0], tuple(entry["shape"]))[2, 3] = value
    weights = open_huggingface(folder)
    with pytest.raises(InputError, match=f"{name} has NaN or infinite"):
        weights.in_memory()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_too_large_for_the_dtype_of_an_export_are_refused_by_name(folder, tmp_path, dtype):
    weights = open_huggingface(folder)
    large = lambda name, layer: weights.read(name, layer) + np.float32(3.4e38)
    with pytest.raises(InputError, match=f"has values above .* of {dtype}"):
        write_huggingface(tmp_path / "out", WeightSource(weights.config, 32, weights.tokenizer, large), dtype)
    assert not (tmp_path / "out").exists()


def test_a_class_and_a_type_that_contradict_each_other_are_refused(folder):
    edit(folder / "config.json", model_type="mistral")
    with pytest.raises(InputError, match="model_type is 'mistral', of another class than LlamaForCausalLM"):
        open_huggingface(folder)


def test_full_attention_in_all_layers_beside_a_window_is_refused(folder):
    edit(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=5)
    assert open_huggingface(folder).config.sliding_window == 5
    edit(folder / "config.json", layer_types=["full_attention"] * 2)
    with pytest.raises(InputError, match="full_attention in all layers, and there is a sliding_window"):
        open_huggingface(folder)


def test_byte_pieces_without_byte_fallback_are_refused(folder):
    (folder / "tokenizer.model").unlink()
    model = json.loads((folder / "tokenizer.json").read_text())["model"] | {"byte_fallback": False}
    edit(folder / "tokenizer.json", model=model)
    with pytest.raises(InputError, match="would lose text"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a": 1, "a": 2}', '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_bad_json_of_any_file_is_one_line_that_names_it(folder, name, content):
    (folder / "tokenizer.model").unlink()
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=rf"\A{folder / name} [^\n]*\Z"):
        open_huggingface(folder)
