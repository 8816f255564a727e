"""A run of a reward model: begun with a language model, its figures, resuming, export, refusals (C4, C7, C8, C9)."""

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from data.segmenter import make_segment, pack
from tests.launch.small_run import back_to, command, here, metrics, write_config
from tests.launch.test_preferences import write_pairs
from tests.launch.test_pretrain import assert_same_end, state_of, without_times
from tests.peers import require
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.evaluation.held_out import stack_rows
from train.evaluation.preferences import pair_of
from train.run.folder import Run
from train.step.objective import scores
from train.weights.huggingface import padding_of_scored
from train.weights.load import load_trained, open_weights

STEPS = 8
FLAGS = [
    "--config.data.segmentation=pack", "--config.data.segment_length=64", f"--config.train.num_steps={STEPS}",
    "--config.data.text_field=good", "--config.data.prompt_field=ask", "--config.data.rejected_field=bad",
    "--config.objective.name=reward", "--config.model.reward_head=true", "--config.checkpoint.every_steps=3",
    "--config.checkpoint.keep=3", "--config.evaluation.sample_tokens=0", "--config.optimizer.learning_rate=3e-3",
]  # fmt: skip
FORK = ["--config.train.init_with=weights"]


def flags_of(folder: Path, parent: Path, run: str = "run") -> list[str]:
    pairs = folder / "pairs.jsonl"
    config = write_config(folder, run)
    corpus = f"--config.data.corpus={pairs if pairs.exists() else write_pairs(pairs)}"
    return [f"--config={config}", corpus, f"--config.train.init_from={parent}@12", *FORK, *FLAGS]


@pytest.fixture(scope="module")
def scored(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a reward model that began with a language model."""
    folder = tmp_path_factory.mktemp("scored")
    assert here("pretrain", *flags_of(folder, finished)) == 0
    return folder / "run"


def test_a_run_begins_with_the_language_model_and_learns_what_is_preferred(scored: Path):
    records = metrics(scored)
    # The head starts at zero.
    assert records[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert [records[0][name] for name in ("accuracy", "margin", "chosen_reward", "rejected_reward")] == [0, 0, 0, 0]
    assert records[-1]["loss"] < math.log(2)
    assert "kl" not in records[0]
    evaluated = [record for record in records if "validation_preference_loss" in record]
    assert [record["step"] for record in evaluated] == [1, 6, STEPS]
    assert evaluated[-1]["validation_preference_loss"] < evaluated[0]["validation_preference_loss"] < 0.7
    assert evaluated[-1]["held_out_preference_accuracy"] > 0.6
    assert not any(name.endswith(("bits_per_byte", "validation_loss", "sample")) for r in records for name in r)


def test_the_first_weights_are_those_of_the_language_model(scored: Path, finished: Path, tmp_path: Path):
    # At a rate of almost zero nothing moves.
    flags = [*flags_of(tmp_path, finished), "--config.optimizer.learning_rate=1e-30", "--config.train.num_steps=1"]
    assert here("pretrain", *flags, "--config.data.validation_fraction=0", "--config.checkpoint.export=false") == 0
    (after, _), (before, _) = state_of(tmp_path / "run", 1), state_of(finished, 12)
    assert after["weights"]["unembedding"].keys() == {"head"}
    assert np.abs(after["weights"]["unembedding"]["head"]).max() < 1e-20
    for part in after["weights"].keys() - {"unembedding"}:
        jax.tree.map(np.testing.assert_array_equal, after["weights"][part], before["weights"][part])


def test_it_resumes_exactly(scored: Path, tmp_path: Path, capsys):
    again = back_to(3, scored, tmp_path / "again")
    assert here("pretrain", f"--config={again}") == 0
    said = capsys.readouterr()
    assert "held-out pairs: loss 0." in said.err
    assert "held-out pairs  " in said.out
    assert "generate" not in said.out
    assert_same_end(again, scored, STEPS)
    assert without_times(metrics(again)) == without_times(metrics(scored))


def test_killed_after_its_first_save_it_ends_with_the_same_bits(scored: Path, finished: Path, tmp_path: Path):
    flags = flags_of(tmp_path, finished)
    process = command("pretrain", *flags, devices=8, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.kill()
    process.wait()
    assert here("pretrain", *flags) == 0
    (state, _), (expected, _) = state_of(tmp_path / "run", STEPS), state_of(scored, STEPS)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_transformers_gives_an_export_the_scores_of_training(scored: Path, capsys):
    torch, transformers = require("torch"), require("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(scored / "export").eval()
    assert model.config.num_labels == 1
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    read = transformers.AutoTokenizer.from_pretrained(scored / "export")
    read.pad_token = read.convert_ids_to_tokens(model.config.pad_token_id)
    assert model.config.pad_token_id == model.config.eos_token_id
    documents = [document for document in Run(scored).held_out_texts() if document.rejected][:4]
    texts = [document.prompt + answer for d in documents for document in [d] for answer in (d.text, d.rejected.text)]
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(scored), predicts=False)
        exported = load_trained(str(scored / "export"), predicts=False)
        jax.tree.map(np.testing.assert_array_equal, exported.weights["unembedding"], trained.weights["unembedding"])
        pairs = [pair_of(trained.tokenizer, document) for document in documents]
        rows = [
            make_segment([part], trained.config.data) for parts in pack(pairs, trained.config.data) for part in parts
        ]
        (batch,) = stack_rows(rows, len(rows))
        found = np.asarray(
            jax.jit(lambda weights, batch: scores(trained.config, weights, batch))(trained.weights, batch)
        )
    assert not found[:, 2:].any()
    inputs = [sequence.inputs.tolist() for pair in pairs for sequence in pair.sequences]
    padded = read.pad({"input_ids": inputs}, return_tensors="pt")
    # The tokenizer makes these inputs of the texts, so that nobody needs to.
    assert read(texts)["input_ids"] == inputs
    with torch.no_grad():
        expected = model(**padded).logits[:, 0].numpy()
    assert np.ptp(expected) > 1e-3
    assert np.abs(found[:, :2].reshape(-1) - expected).max() <= 1e-4
    card = (scored / "export" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "in the right order" in card


def test_a_report_and_a_plan_have_no_bits_a_byte(scored: Path, tmp_path: Path, capsys):
    assert here("report", scored, f"--output={tmp_path / 'report.html'}") == 0
    page = (tmp_path / "report.html").read_text()
    assert "in the right order" in page
    assert "bits a byte" not in page
    capsys.readouterr()
    assert here("plan", f"--config={scored}", "--json") == 0
    (state, _), planned = state_of(scored, STEPS), json.loads(capsys.readouterr().out)
    parameters = sum(x.size for x in jax.tree.leaves(state["weights"]))
    # Weights and two moments in float32, on eight devices; the rest is the batch, and norms that they do not share. An
    # unembedding would add 37%.
    assert planned["argument_bytes_per_device"] == pytest.approx(3 * 4 * parameters / 8, rel=0.1)


def test_what_predicts_tokens_refuses_it_in_one_line(scored: Path, tmp_path: Path, capsys):
    for arguments in (
        ["generate", scored, "--prompt=a"], ["chat", scored], ["inspect", "loss", scored, "--prompt=a"],
        ["evaluate", scored], ["inspect", "weights", scored / "export"], ["generate", scored / "export", "--prompt=a"],
    ):  # fmt: skip
        capsys.readouterr()
        assert here(*arguments) == 2, arguments
        assert "is a reward model, which scores answers and predicts no tokens" in capsys.readouterr().err
    assert here("export", scored, "--format=gguf", f"--to={tmp_path / 'model.gguf'}") == 2
    assert "llama.cpp predicts tokens" in capsys.readouterr().err
    assert here("inspect", "embedding", scored, "--word=my") == 0
    assert here("inspect", "attention", scored, "--prompt=my cat", f"--to={tmp_path / 'page.html'}") == 0


def test_an_export_comes_back_as_a_run_and_checkpoints_are_merged(scored: Path, tmp_path: Path):
    assert here("import", scored / "export", f"--to={tmp_path / 'imported'}") == 0
    assert here("merge", f"{scored}@6", f"{scored}@{STEPS}", f"--to={tmp_path / 'merged'}") == 0
    places = (tmp_path / "imported", tmp_path / "merged", f"{scored}@6", f"{scored}@{STEPS}")
    with jax.set_mesh(one_device_mesh()):
        loaded = [load_trained(str(place), predicts=False).weights for place in places]
    imported, merged, earlier, last = (np.asarray(weights["unembedding"]["head"]) for weights in loaded)
    np.testing.assert_array_equal(imported, last)
    np.testing.assert_allclose(merged, (earlier + last) / 2, rtol=1e-6)


def test_padding_is_never_the_last_token_of_a_text_that_is_scored(scored: Path):
    weights = open_weights(str(scored))
    tokenizer = weights.tokenizer
    assert padding_of_scored(weights) == tokenizer.eos_id
    assert padding_of_scored(dataclasses.replace(weights, converses=True)) is None
    for pad_id, expected in ((tokenizer.eos_id, None), (7, 7)):
        tokenizer.generation_config = {"pad_token_id": pad_id}
        assert padding_of_scored(dataclasses.replace(weights, converses=True)) == expected


def test_settings_that_do_not_fit_are_refused_together():
    def lines(**values: dict) -> str:
        with pytest.raises(ValueError) as caught:
            make_config(values)
        return str(caught.value)

    assert "objective.name = reward trains scores; set model.reward_head=true" in lines(objective={"name": "reward"})
    assert "set objective.name=reward" in lines(model={"reward_head": True})
    head = {"reward_head": True, "tie_embeddings": True, "logit_softcap": 30.0, "loss_chunk": 8, "z_loss": 1e-4}
    found = lines(
        model=head | {"logit_multiplier": 2.0, "label_smoothing": 0.1},
        objective={"name": "reward", "beta": 0.1, "gamma": 2.0, "length_normalized": True},
        evaluation={"sample_tokens": 9, "prompt": "x", "tasks": "arc_easy"},
        data={"corpus": "pairs.jsonl"},
    )
    names = [f"model.{name}" for name in (*head, "logit_multiplier", "label_smoothing") if name != "reward_head"]
    names += ["objective.beta", "objective.gamma", "objective.length_normalized"]
    names += ["evaluation.sample_tokens", "evaluation.prompt", "evaluation.tasks"]
    for name in names:
        assert f"{name} has no effect with " in found, name
    assert "name the field of the rejected one with data.rejected_field" in found
    make_config({"model": {"reward_head": True}, "objective": {"name": "reward"}, "evaluation": {"sample_tokens": 0}})


def test_a_fork_takes_over_what_it_can(scored: Path, finished: Path, tmp_path: Path, capsys):
    for where, flags, word in (
        (f"{finished}@12", ["--config.train.init_with=optimizer", "--config.train.num_steps=20"], "model.reward_head"),
        (
            f"{scored}@{STEPS}",
            ["--config.model.reward_head=false", "--config.objective.name=simpo"],
            "model.reward_head",
        ),
    ):
        capsys.readouterr()
        start = flags_of(tmp_path, finished)
        assert here("pretrain", *start, f"--config.train.init_from={where}", *flags) == 2
        assert word in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    # A reward model's own head goes on.
    start = [*flags_of(tmp_path, scored), f"--config.train.init_from={scored}@{STEPS}", "--config.train.num_steps=1"]
    assert here("pretrain", *start, "--config.data.validation_fraction=0", "--config.checkpoint.export=false") == 0
    assert metrics(tmp_path / "run")[0]["margin"] > 0
