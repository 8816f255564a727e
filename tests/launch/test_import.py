"""Exported weights come back bit for bit, and weights of other projects become runs (C7, C9)."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.interchange.huggingface import Interchange
from model.interchange.tensors import nested_weights, reader_of
from model.trees import flattened
from tests.launch.small_run import here, metrics, write_corpus
from tests.peers import require
from tests.small import small_model, small_weights
from tests.theirs import assert_same_logits
from train.devices.mesh import one_device_mesh
from train.run.folder import Run
from train.weights import safetensors_files as tensor_files
from train.weights.huggingface import exported_step
from train.weights.load import load_trained

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
KEPT = ["--config.checkpoint.export=false", "--config.evaluation.every_steps=99", "--config.evaluation.sample_tokens=0"]


@pytest.fixture(scope="module")
def imported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the finished run, imported as a run."""
    run = tmp_path_factory.mktemp("imported") / "run"
    assert here("import", finished / "export", f"--to={run}") == 0
    return run


def trained(run: Path | str) -> tuple:
    with jax.set_mesh(one_device_mesh()):
        found = load_trained(str(run))
        return found, flattened(jax.device_get(found.weights))


def without_padding(weights: dict[str, np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    axis = {"embedding.table": 0, "unembedding.matrix": 1}
    return {name: np.take(x, range(vocab_size), axis[name]) if name in axis else x for name, x in weights.items()}


def test_a_run_exported_and_imported_is_the_same_bit_for_bit(finished: Path, imported: Path, tmp_path: Path, capsys):
    before, weights = trained(finished)
    after, again = trained(imported)
    assert after.step == 0
    assert after.config.model == before.config.model
    assert after.config.data.segment_length == before.config.data.segment_length == 32
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    V = before.tokenizer.vocab_size
    expected, found = (without_padding(flat, V) for flat in (weights, again))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])

    # It works as a run, and except for the step its own export equals that of the run that trained it.
    figures = []
    for model in (finished, imported):
        capsys.readouterr()
        assert here("evaluate", model, f"--corpus={finished / 'held_out.jsonl'}", "--json") == 0
        figures.append(json.loads(capsys.readouterr().out))
        assert here("generate", model, "--prompt=the cat", "--greedy", "--max_new_tokens=8") == 0
        figures[-1]["text"] = capsys.readouterr().out
    assert figures[0].pop("step") == 12
    assert figures[1].pop("step") == 0
    assert figures[0].pop("text") == figures[1].pop("text")
    # Sums round differently in batches of another size.
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert here("export", f"{imported}@0", "--format=hf", f"--to={tmp_path / 'again'}") == 0
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "again", finished / "export"))
    assert again.read_bytes() == first.read_bytes()
    assert exported_step(tmp_path / "again") == 0


def test_a_run_begins_with_imported_weights_and_learns_another_corpus(imported: Path, tmp_path: Path, capsys):
    text = write_corpus(tmp_path / "other.jsonl").read_text()
    for old, new in (("cat", "otter"), ("sees", "follows"), ("bird", "river")):
        text = text.replace(old, new)
    (tmp_path / "other.jsonl").write_text(text)
    fork = tmp_path / "fork"
    start = ["pretrain", f"--config={imported}@0", f"--config.train.run_dir={fork}", *KEPT,
             f"--config.data.corpus={tmp_path / 'other.jsonl'}", "--config.train.num_steps=8",
             "--config.train.batch_size=8", "--config.optimizer.learning_rate=3e-3",
             "--config.evaluation.max_bytes=3000", "--config.evaluation.loop_bytes=1000",
             "--config.model.compute_dtype=float32"]  # fmt: skip
    assert here(*start) == 0
    assert [record["step"] for record in metrics(fork)] == list(range(1, 9))
    held_out, bits = fork / "held_out.jsonl", []
    for model in (imported, fork):
        capsys.readouterr()
        assert here("evaluate", model, f"--corpus={held_out}", "--json") == 0
        bits.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert bits[1] < bits[0] - 0.2
    assert Run(imported).last_step() == 0

    # It cannot be resumed in its own folder: it has no optimizer state and no position in any data.
    for flags, words in (
        (["report", imported], "holds weights alone, which have no steps and no data"),
        (["inspect", "data", imported, "--step=1"], "holds weights alone, which have no steps and no data"),
        (["pretrain", f"--config={imported}"], "holds weights alone, from which another run can start"),
        ([*start, "--config.train.run_dir=x", "--config.train.init_with=all"], "set train.init_with=weights"),
    ):
        capsys.readouterr()
        assert here(*flags) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("per_token", [1, 3])
def test_a_mixture_begins_with_the_loss_of_the_dense_model(finished: Path, per_token: int, tmp_path, capsys):
    mixture, weights = tmp_path / "mixture", finished / "export"
    flags = ["--experts=4", f"--experts-per-token={per_token}"]
    assert here("import", weights, f"--to={mixture}", *flags) == 0
    assert Run(mixture).load_config().model.num_experts == 4
    bits = []
    for model in (weights, mixture):
        capsys.readouterr()
        assert here("evaluate", model, f"--corpus={finished / 'held_out.jsonl'}", "--json") == 0
        bits.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert bits[1] == pytest.approx(bits[0], rel=1e-6)

    for wrong, words in (
        (["--experts=x"], "--experts=x: give a whole number from 1 to 16384"),
        (["--experts=2", "--experts-per-token=3"], "model.num_experts = 2 is below model.experts_per_token = 3"),
        (["--experts-per-token=3"], "--experts-per-token=3 goes with --experts=N"),
    ):
        assert here("import", weights, f"--to={tmp_path / 'none'}", *wrong) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


PUBLISHED = {
    "LlamaForCausalLM": {"num_hidden_layers": 2, "num_key_value_heads": 2, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "MistralForCausalLM": {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 6},
    "Qwen3ForCausalLM": {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16,
                         "tie_word_embeddings": True},
    "GemmaForCausalLM": {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16},
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32},
    "OpenAIGPTLMHeadModel": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32, "bos_token_id": 0},
}  # fmt: skip
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 32}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_a_published_architecture_gives_the_same_logits(architecture: str, finished: Path, tmp_path: Path):
    """Transformers builds the model with random weights and writes it in several files."""
    torch, transformers = require("torch"), require("transformers")
    model_class, values = getattr(transformers, architecture), PUBLISHED[architecture]
    values = values if architecture.startswith(("GPT2", "OpenAI")) else COMMON | values
    torch.manual_seed(0)
    vocab_size = trained(finished)[0].tokenizer.vocab_size
    model = model_class(model_class.config_class(vocab_size=vocab_size, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / "model.safetensors.index.json").exists()
    for name in TOKENIZER:
        shutil.copy(finished / "export" / name, folder)
    assert here("import", folder, f"--to={tmp_path / 'run'}") == 0

    assert_same_logits(tmp_path / "run", folder)


def test_an_export_of_several_files_in_16_bits_is_what_transformers_reads(finished: Path, tmp_path: Path, monkeypatch):
    torch, transformers = require("torch"), require("transformers")
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 20_000)
    to = tmp_path / "weights"
    assert here("export", finished, "--format=hf", f"--to={to}", "--dtype=bfloat16") == 0
    index = json.loads((to / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in to.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(p.size for p in load_file_bits(to)) * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(to, dtype="auto")
    assert model.dtype == torch.bfloat16
    exact = load_file(finished / "export" / "model.safetensors")
    for name, parameter in model.state_dict().items():
        expected = torch.tensor(exact[name]).to(torch.bfloat16)
        assert torch.equal(parameter, expected), name
    # A single file replaces several.
    monkeypatch.undo()
    assert here("export", to, "--format=hf", f"--to={to}", "--dtype=float16") == 0
    assert [path.name for path in to.glob("*.safetensors")] == ["model.safetensors"]
    assert exported_step(to) == 12


def load_file_bits(folder: Path) -> list[np.ndarray]:
    read = tensor_files.TensorFiles(folder)
    return [read(name) for name in read.names]


def test_the_card_describes_the_run(finished: Path):
    card = (finished / "export" / "README.md").read_text()
    last = metrics(finished)[-1]
    for words in (
        "12 steps, 3,072 tokens, padding included", "| parameters | 4", "2 layers of width 32", "corpus.jsonl",
        f"{last['held_out_bits_per_byte']:.4f} bits a byte", "AutoModelForCausalLM", "No license is stated here",
    ):  # fmt: skip
        assert words in card, words
    data = json.loads((finished / "events.jsonl").read_text().splitlines()[0])["data"]
    assert f"| fingerprint of the data | {data[:12]} |" in card


def test_the_card_describes_the_weights_of_its_step(finished: Path, tmp_path: Path):
    assert here("export", f"{finished}@8", "--format=hf", f"--to={tmp_path / 'weights'}") == 0
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "8 steps, 2,048 tokens, padding included" in card
    of_step = next(record for record in metrics(finished) if record["step"] == 8)
    assert ("held-out text" in card) == ("validation_loss" in of_step)
    assert f"{metrics(finished)[-1]['held_out_bits_per_byte']:.4f} bits a byte" not in card


def test_a_refused_import_names_its_problem_and_writes_nothing(finished: Path, imported: Path, tmp_path: Path, capsys):
    export, to = finished / "export", tmp_path / "run"

    def broken(name: str, config: dict | None = None, tensors=lambda tensors: tensors, file: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(export, folder)
        values = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(values))
        path = folder / "model.safetensors"
        changed = tensors(load_file(path))
        save_file(changed, path)
        if not file:
            path.unlink()
        return folder

    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    table, norm = "model.embed_tokens.weight", "model.norm.weight"
    cases = [
        (broken("a", {"architectures": ["BertModel"]}), "architectures is ['BertModel']; what can be read is Gemma"),
        (broken("b", {"rms_norm_eps": float("nan")}), "rms_norm_eps is nan; it must be a number"),
        (broken("c", {"hidden_size": 40}), "model.embed_tokens.weight has the shape (366, 32); the config wants"),
        (broken("d", tensors=lambda t: t | extra), "this model has no place for model.layers.0.self_attn.q_proj.bias"),
        (broken("e", tensors=lambda t: {n: x for n, x in t.items() if n != norm}), f"there is no {norm}"),
        (broken("f", tensors=lambda t: t | {norm: t[norm].astype(np.int32)}), f"{norm} is of the dtype I32"),
        (broken("g", file=False), "has no model.safetensors, nor model.safetensors.index.json"),
        (broken("h", {"vocab_size": 64}, lambda t: t | {table: t[table][:64], "lm_head.weight": t[table][:64]}),
         "the tokenizer has 366 ids, the model 64"),
        (broken("k", {"num_hidden_layers": 10**4}), "the config says 10000 layers, and there are 21 tensors"),
        (broken("i", {"ziggurat": {"qk_norm": True}}), "ziggurat is {'qk_norm': True}; it may hold position"),
        (tmp_path / "none", "there is no such folder"),
        (finished, "has no model.safetensors"),
    ]  # fmt: skip
    shards = broken("j")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (shards / "model.safetensors").rename(shards / first)
    index = {"weight_map": dict.fromkeys(load_file(shards / first), second)}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    cases.append((shards, f"there is no {second}, which model.safetensors.index.json names"))
    (damaged := broken("l") / "config.json").write_text("{")
    (pickled := broken("m", file=False) / "pytorch_model.bin").write_bytes(b"")
    cases += [
        (damaged.parent, f"{damaged} is damaged (no JSON: Expecting property name"),
        (pickled.parent, "save pickled ones with Transformers' save_pretrained"),
    ]
    for folder, words in cases:
        capsys.readouterr()
        assert here("import", folder, f"--to={to}") == 2, words
        error = capsys.readouterr().err
        assert words in error, error
        assert not to.exists()
    assert here("import", export, f"--to={imported}") == 2
    assert "is there already; name a new folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_refused_export_names_its_problem_and_overwrites_nothing(finished: Path, tmp_path: Path, capsys, monkeypatch):
    others = shutil.copytree(finished / "export", tmp_path / "others")
    values = json.loads((others / "config.json").read_text())
    del values["pretraining_step"]
    (others / "config.json").write_text(json.dumps(values))
    capped = shutil.copytree(finished, tmp_path / "capped")
    settings = json.loads((capped / "config.json").read_text())
    settings["model"]["attention_softcap"] = 30.0
    (capped / "config.json").write_text(json.dumps(settings))
    other = f"--to={tmp_path / 'x'}"
    for run, flags, words in (
        (finished, [f"--to={others}"], "holds other things than an export"),
        (finished, [other, "--dtype=int8"], "it is one of float32, bfloat16, float16"),
        (finished, [f"--to={others / 'config.json'}"], "is a file; name a folder"),
        (capped, [other], "cannot be exported: LlamaForCausalLM in Transformers has no model.attention_softcap = 30.0"),
    ):
        capsys.readouterr()
        assert here("export", run, "--format=hf", *flags) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**3))
    assert here("export", finished, "--format=hf", other) == 1
    assert f"{tmp_path} has 0.0 MB free, and 0." in capsys.readouterr().err
    assert json.loads((others / "config.json").read_text()) == values
    assert not (tmp_path / "x").exists()


def test_a_value_too_large_for_float16_is_refused(finished: Path, tmp_path: Path, capsys):
    weights = shutil.copytree(finished / "export", tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1e6}, weights / "model.safetensors")
    assert here("export", weights, "--format=hf", f"--to={tmp_path / 'half'}", "--dtype=float16") == 2
    assert "model.norm.weight has values above 65504" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_file_of_masks_and_short_names_is_read_as_the_class_would(tmp_path: Path):
    """The first files of GPT-2 omit the prefix of each name and hold masks with the weights."""
    config = small_model(position="learned", max_positions=16, gated=False, num_kv_heads=4, norm="layernorm",
                         attention_bias=True, feedforward_bias=True, tie_embeddings=True)  # fmt: skip
    model = Interchange(config, 16)
    tensors = dict(model.export_tensors(reader_of(small_weights(config))))
    short = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    short |= {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32), "h.1.attn.masked_bias": np.float32([0.0])}
    names = model.full_names(short)
    read = lambda name: short[names[name]]
    model.check_tensors(names, read)
    for name, array in flattened(nested_weights(config, model.import_reader(read))).items():
        assert array.dtype == np.float32, name
    short["lm_head.weight"] = short["wte.weight"]
    names = model.full_names(short)
    model.check_tensors(names, read)
    short["lm_head.weight"] = short["wte.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        model.check_tensors(names, read)
