"""Tasks of lm-evaluation-harness: our answers are those of its own adapter, by the command and inside training."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.harness import DOCUMENTS, TASKS, write_tasks
from tests.launch.small_run import here, metrics, write_config
from tests.peers import require
from train.run.folder import Run
from train.weights.load import load_trained


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require("lm_eval")
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield write_tasks(folder / "tasks")


def evaluated(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert here("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


# The harness's own adapter lets the tokenizer put its token before a text, except before whole texts, where the harness
# would score that token, too.
BEFORE = dict.fromkeys(("texts", "loglikelihood_rolling"), False)


def hugging_face(export: Path):
    """The harness's own adapter to Transformers."""
    for peer in ("torch", "transformers", "accelerate"):
        require(peer)
    from lm_eval.models.huggingface import HFLM

    # Its cache of logits, on by default, gets one pair of this file wrong by 4 nats, but right without the others.
    return HFLM(pretrained=str(export), device="cpu", dtype="float32", batch_size=8, logits_cache=False)


def test_tasks_have_the_figures_of_the_harnesss_own_adapter(finished: Path, tasks: Path, capsys):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from train.evaluation.harness import silence_harness

    found = evaluated(capsys, finished / "export", f"--tasks={','.join(TASKS)}", f"--task_dir={tasks}")
    assert found.keys() == {"tasks", "task_errors"}
    manager, model = TaskManager(include_path=tasks, include_defaults=False), hugging_face(finished / "export")
    for name, values in found["tasks"].items():
        model.add_bos_token = BEFORE.get(name)
        with silence_harness():
            theirs = simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0)
        assert len(theirs["samples"][name]) == len(DOCUMENTS), name
        for metric, value in values.items():
            exact = metric in ("acc", "acc_norm", "exact_match")
            assert value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=0 if exact else 1e-5), metric
    assert found["tasks"].keys() == TASKS.keys()
    assert 0 < found["tasks"]["choices"]["acc"] < 1
    assert found["task_errors"].keys() == {"choices", "words", "endings"}


def test_answers_are_those_of_the_harnesss_own_adapter(finished: Path, tasks: Path):
    from lm_eval.api.instance import Instance

    from train.devices.mesh import one_device_mesh
    from train.evaluation.harness import HarnessModel, silence_harness

    pairs = [
        (document["begin"], choice) for document in DOCUMENTS[:6] for choice in (*document["choices"], " ", " sees.")
    ]
    pairs += [("", "the cat eats"), ("the cat ", "eats a dog"), ("the cat eats a dog. " * 6, "the cat")]
    texts = ["the cat", "a dog eats my bird. " * 9, "é and 漢"]
    starts = [("the cat eats", {"until": ["."], "max_gen_toks": 9}), ("a", {"until": " "})]
    starts = [(context, settings | {"do_sample": False, "max_gen_toks": 9}) for context, settings in starts]

    def answers(model) -> list:
        found = []
        for ask, given in (("loglikelihood", pairs), ("loglikelihood_rolling", texts), ("generate_until", starts)):
            model.add_bos_token = BEFORE.get(ask)
            with silence_harness():
                requests = [Instance(ask, {}, of if isinstance(of, tuple) else (of,), 0) for of in given]
                found.append(getattr(model, ask)(requests))
        return found

    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(finished / "export"))
        model = HarnessModel(trained.config, trained.tokenizer, lambda: None)
        model.weights = trained.weights
        ours = answers(model)
    theirs = answers(hugging_face(finished / "export"))
    for (score, greedy), (their_score, their_greedy) in zip(ours[0], theirs[0], strict=True):
        assert abs(score - their_score) <= 1e-4
        assert greedy == bool(their_greedy)
    assert {greedy for _, greedy in ours[0]} == {False, True}
    assert np.abs(np.array(ours[1]) - theirs[1]).max() <= 1e-3  # of hundreds of tokens
    assert ours[2] == theirs[2]


def test_the_table_has_values_and_errors_and_text_can_be_asked_for_beside(finished: Path, tasks: Path, capsys):
    capsys.readouterr()
    flags = [f"--task_dir={tasks}", "--limit=5", f"--corpus={finished / 'held_out.jsonl'}"]
    assert here("evaluate", finished, "--tasks=choices, words", *flags) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["step", "12"]
    assert [line.split()[0] for line in lines].count("bits_per_byte") == 1
    assert lines[-5].split() == ["task", "metric", "value"]
    assert [line.split()[:2] for line in lines[-4:]] == [
        [task, metric] for task, metric in (("choices", "acc"), ("choices", "acc_norm"), ("words", "perplexity"),
                                            ("words", "acc"))]  # fmt: skip
    assert all(" ± " in line for line in lines[-4:])
    # Five documents: fifths.
    assert float(lines[-4].split()[2]) * 5 == pytest.approx(round(float(lines[-4].split()[2]) * 5))
    assert captured.err == ""


def test_examples_come_before_the_documents(finished: Path, tasks: Path, capsys):
    flags = [finished / "export", "--tasks=words", f"--task_dir={tasks}"]
    perplexities = [
        evaluated(capsys, *flags, *more)["tasks"]["words"]["perplexity"]
        for more in ([], ["--num_fewshot=0"], ["--num_fewshot=2"], ["--num_fewshot=2"])
    ]
    assert perplexities[0] == perplexities[1] != perplexities[2] == perplexities[3]


BROKEN = {
    "damaged.yaml": "task: [damaged\n",
    "nodata.yaml": "task: nodata\ninclude: choices.yaml\ndataset_kwargs: {data_files: {test: none.jsonl}}\n",
    "column.yaml": "task: column\ninclude: choices.yaml\ndoc_to_text: '{{no.such.thing}}'\n",
    "unsafe.yaml": "task: unsafe\ninclude: choices.yaml\nunsafe_code: true\n",
}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--tasks=nothing"],
            "has no task nothing; it has choices, column, endings, nodata, texts, unsafe, words\n",
        ),
        (["--tasks=damaged"], "damaged.yaml cannot be read: ParserError"),
        (["--tasks=nodata"], "--tasks: the task nodata cannot be used: FileNotFoundError"),
        (["--tasks=column"], "--tasks: the task column cannot be used: UndefinedError: 'no' is undefined"),
        (["--tasks=unsafe"], "--tasks: the task unsafe cannot be used: ValueError: it runs code that the model writes"),
        (["--tasks=,"], "--tasks is empty"),
        (["--tasks=choices", "--task_dir=none"], "--tasks: there is no folder none with tasks"),
        (["--tasks=choices", "--limit=0", "--num_fewshot=-1"], "--num_fewshot=-1 must be at least 0\n"),
        (["--limit=3"], "--limit has no effect without --tasks"),
    ],
)
def test_what_is_wrong_with_tasks_is_told_before_anything_is_loaded(
    flags: list[str], words: str, tasks: Path, tmp_path: Path, capsys
):
    folder = tmp_path / "tasks"
    shutil.copytree(tasks, folder)
    for name, text in BROKEN.items():
        (folder / name).write_text(text)
    if not any("task_dir" in flag for flag in flags):
        flags = [*flags, f"--task_dir={folder}"]
    assert here("evaluate", "no-run", *flags) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_harness_that_is_not_installed_is_named(finished: Path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert here("evaluate", finished, "--tasks=hellaswag") == 2
    assert "--tasks needs the package lm-eval: pip install -e '.[tasks]'" in capsys.readouterr().err
    config = write_config(finished.parent, "another")
    assert here("pretrain", f"--config={config}", "--config.evaluation.tasks=hellaswag") == 2
    assert "evaluation.tasks needs the package lm-eval" in capsys.readouterr().err
    assert not (finished.parent / "another").exists()


def test_a_run_that_is_evaluated_on_tasks_has_the_weights_of_one_that_is_not(
    finished: Path, tasks: Path, tmp_path: Path, capsys
):
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path)
    flags = {"tasks": "choices,endings,texts", "task_dir": tasks, "task_limit": 3, "tasks_every_steps": 8}
    given = [f"--config.evaluation.{name}={value}" for name, value in flags.items()]
    assert here("pretrain", f"--config={write_config(tmp_path)}", *given) == 0
    run = tmp_path / "run"
    assert (run / "export" / "model.safetensors").read_bytes() == (
        finished / "export" / "model.safetensors"
    ).read_bytes()
    records, before = metrics(run), metrics(finished)
    assert [record["loss"] for record in records] == [record["loss"] for record in before]
    assert [record["step"] for record in records if "tasks" in record] == [1, 8, 12]
    assert [record["step"] for record in records if "sample" in record] == [1, 6, 12]
    last = records[-1]["tasks"]
    assert f"step 12  choices: acc {last['choices']['acc']:.4f}, acc_norm" in capsys.readouterr().err
    flags = [f"--tasks={flags['tasks']}", f"--task_dir={tasks}", "--limit=3"]
    again = evaluated(capsys, run, *flags)["tasks"]
    assert again.keys() == last.keys() == {"choices", "endings", "texts"}
    assert again["choices"] == last["choices"]
    assert again["texts"]["bits_per_byte"] == pytest.approx(last["texts"]["bits_per_byte"], rel=1e-5)
    assert Run(run).load_config().evaluation.tasks == "choices,endings,texts"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tasks", "nothing", "evaluation.tasks: {tasks} has no task nothing; it has choices, endings, texts, words"),
        ("task_limit", "0", "evaluation.task_limit is 0; it must be at least 1"),
        ("tasks", "none", "evaluation.task_dir has no effect without evaluation.tasks"),
    ],
)
def test_a_run_whose_tasks_are_wrong_does_not_begin(
    field: str, value: str, words: str, tasks: Path, tmp_path: Path, capsys
):
    given = {"tasks": "choices", "task_dir": tasks} | {field: value}
    flags = [f"--config.evaluation.{name}={value}" for name, value in given.items()]
    assert here("pretrain", f"--config={write_config(tmp_path)}", *flags) == 2
    assert words.format(tasks=tasks) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
