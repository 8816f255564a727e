"""`ziggurat ladder`: trunks and branches, what it predicts, how it goes on, and what it refuses."""

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from launch import ladder_runs, many_runs
from launch.ladder_runs import Ladder, Point, Result, fit_points, planned_ladder, read_points
from launch.ladder_text import short
from launch.many_runs import PlannedRun, unfinished
from launch.presets import load_config
from tests.benchmarks import ladder as benchmark
from tests.launch.small_run import command, here, kill_once, metrics, write_config, ziggurat
from train.evaluation.documents import choose_held_out
from train.planning.family import size_of
from train.planning.scaling import Interval, Law
from train.prepare import open_run_mixture
from train.run.comparison import tokens_after
from train.run.events import read_events
from train.run.folder import HeldOutDocument, Run

LAW = Law(E=0.8, A=30.0, B=40.0, alpha=0.4, beta=0.35)
STEPS = {"train.num_steps": "1200"}
FLAGS: dict[str, float] = {"rungs": 5, "scale": 2, "longest": 2, "least_rows": 8, "least_steps": 8}
SMALL = ["--rungs=5", "--scale=2", "--least-rows=8", "--least-steps=8", "--config.train.num_steps=1200"]
REWARD = ["--config.model.reward_head=true", "--config.objective.name=reward", "--config.data.rejected_field=other",
          "--config.data.segmentation=pack", "--config.evaluation.sample_tokens=64"]  # fmt: skip
TEXTS = (HeldOutDocument("text"),)


def write_target(folder: Path) -> Path:
    """A config of two layers, as all rungs have, and of widths enough for five, which eight devices can share."""
    config = write_config(folder)
    text = config.read_text().replace('heads": 4', 'heads": 8').replace('"model_dim": 32', '"model_dim": 128')
    config.write_text(text.replace('"feedforward_dim": 64', '"feedforward_dim": 256'))
    return config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_target(tmp_path)


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of configs of which steps were timed; nothing is."""
    calls: list[int] = []
    monkeypatch.setattr(
        ladder_runs, "time_steps", lambda configs: calls.append(len(configs)) or dict.fromkeys(configs, 0.5)
    )
    return calls


def ladder_of(config: Path, folder: Path, **flags: float) -> Ladder:
    """The plan that the command makes of a small run's config."""
    return planned_ladder(str(config), STEPS, load_config(str(config), STEPS), folder, FLAGS | flags)


def finish(
    planned: PlannedRun,
    bits: float | None = None,
    texts: Sequence[HeldOutDocument] = TEXTS,
    steps: int | None = None,
    noise: float = 0.0,
) -> int:
    """Leave a run as its training would, with the loss of the law and some noise in its log."""
    run, config = planned.run, planned.config
    steps = steps or config.train.num_steps
    run.folder.mkdir(parents=True)
    run.save_config(config.resolved(512))
    run.save_held_out([*texts])
    N, D = size_of(config.resolved(512)), tokens_after(config, steps)
    bits = LAW.loss(N, D) * math.exp(noise) if bits is None else bits
    record = {"step": steps, "loss": 1.0, "loss_weight": 1.0, "utilization": 1.0, "tokens_per_second": 1.0,
              "data_wait_seconds": 0.0, "validation_loss": 1.0, "validation_bits_per_byte": 9.0,
              "held_out_loss": 1.0, "held_out_bits_per_byte": bits}  # fmt: skip
    run.metrics.write_text(json.dumps(record) + "\n")
    run.events.write_text(
        json.dumps({"event": "end", "time": "2026-01-01T00:00:00.000+00:00", "step": steps, "seconds": {}}) + "\n"
    )
    return 0


def test_a_finished_ladder_predicts_what_its_law_says_and_is_found_again(
    config: Path, tmp_path: Path, monkeypatch, capsys, timed
):
    trained: list[str] = []
    monkeypatch.setattr(many_runs, "train", lambda planned: trained.append(planned.name) or finish(planned))
    command = ["ladder", f"--config={config}", *SMALL, f"--to={tmp_path / 'to'}", "--json", "--budget=1e13"]
    assert here(*command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert trained[:6] == ["rung-1-trunk", *(f"rung-1-branch-{i}" for i in (1, 2, 3, 4)), "rung-2-trunk"]
    assert len(trained) == 25
    assert "25 runs in" in captured.err
    assert timed == [5]
    target = load_config(str(config), STEPS)
    D = 1200 * 8 * 32
    assert result["target"]["N"] == pytest.approx(size_of(target))
    assert result["target"]["D"] == D
    assert result["target"]["bits"]["value"] == pytest.approx(LAW.loss(size_of(target), D), abs=1e-5)
    assert result["law"]["alpha"]["value"] == pytest.approx(0.4, abs=1e-3)
    assert len(result["points"]) == 20
    assert [held["predicted"] for held in result["held_back"]] == pytest.approx(
        [held["bits"] for held in result["held_back"]], abs=1e-4
    )
    assert (result["best"]["N"]["value"], result["best"]["D"]["value"]) == pytest.approx(LAW.best(1e13), rel=0.01)
    page = (tmp_path / "to" / "ladder.html").read_text()
    assert "Residuals" in page
    assert f"target, N = {short(size_of(target))}" in page

    # Without --json, and nothing is trained or timed again.
    command.remove("--json")
    assert here(*command, "--topology=h100:1x8", "--mfu=0.4", "--price=2.5") == 0
    text = capsys.readouterr().out
    assert len(trained) == 25
    assert timed == [5]
    assert f"{result['target']['bits']['value']:.4f} bits a byte" in text
    assert "days on h100:1x8 at 40% MFU, $" in text
    assert "check: without the largest rung, the law misses its 4 runs by" in text
    assert "learns something new" not in text


def test_a_rung_that_learns_faster_with_more_tokens_is_said(config: Path, tmp_path: Path, monkeypatch, capsys):
    def train(planned: PlannedRun) -> int:
        # Such as copying: no longer run of a smaller model has learned it.
        return finish(planned, noise=-0.1 if planned.name == "rung-4-branch-4" else 0.0)

    monkeypatch.setattr(many_runs, "train", train)
    assert here("ladder", f"--config={config}", *SMALL, f"--to={tmp_path / 'to'}") == 0
    text = capsys.readouterr().out
    assert text.count("learns something new") == 1
    [(drop, before)] = re.findall(r"doubtful: rung-4-branch-4 gains ([\d.]+) bits by .*, after ([\d.]+)", text)
    rows = [line.split() for line in text.splitlines() if line.startswith("rung-4-branch-")]
    losses = [float(row[3]) for row in rows[1:]]
    assert float(before) == pytest.approx(losses[0] - losses[1], abs=1e-3)
    assert float(drop) == pytest.approx(losses[1] - losses[2], abs=1e-3)


def test_after_a_stop_the_same_command_goes_on(config: Path, tmp_path: Path, monkeypatch, capsys):
    trained: list[str] = []

    def train(planned: PlannedRun) -> int:
        trained.append(planned.name)
        return 75 if len(trained) == 8 else finish(planned)

    monkeypatch.setattr(many_runs, "train", train)
    command = ["ladder", f"--config={config}", *SMALL, f"--to={tmp_path / 'to'}"]
    assert here(*command) == 75
    assert capsys.readouterr().out == ""
    assert here(*command) == 0
    assert trained[7] == trained[8] == "rung-2-branch-2"
    assert len(trained) == 26


def finish_all_but(real: Sequence[PlannedRun], ladder: Ladder, texts: Sequence[HeldOutDocument]) -> None:
    """Leave all runs of a ladder but these as their training would."""
    for planned in ladder.runs:
        if planned not in real:
            finish(planned, texts=texts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    """A finished ladder, of which the first trunk and its second branch are real runs."""
    folder = tmp_path_factory.mktemp("ladder")
    ladder = ladder_of(write_target(folder), folder / "to")
    real = (ladder.trunks[0], ladder.branches[0][1])
    assert [here(*planned.words) for planned in real] == [0, 0]
    finish_all_but(real, ladder, real[0].run.held_out_texts())
    return ladder


def test_a_branch_decays_from_its_trunks_checkpoint(trained: Ladder):
    """The rate of the trunk is constant to its end, and a branch of it has as many tokens as planned."""
    rung, trunk, branch = trained.rungs[0], trained.trunks[0], trained.branches[0][1]
    begin, end = rung.branches[1]
    of_trunk = metrics(trunk.run.folder)
    peak, warmup = rung.fields["optimizer.learning_rate"], rung.fields["optimizer.warmup_steps"]
    assert [r["learning_rate"] for r in of_trunk][warmup:] == pytest.approx([peak] * (rung.trunk_steps - warmup))
    assert len(of_trunk) == rung.trunk_steps
    kept = {int(path.name) for path in (trunk.run.folder / "checkpoints").iterdir()}
    assert kept >= {begin for begin, _ in rung.branches}
    assert not (trunk.run.folder / "export").exists()

    of_branch = metrics(branch.run.folder)
    assert [record["step"] for record in of_branch] == list(range(begin + 1, end + 1))
    rates = [record["learning_rate"] for record in of_branch]
    assert rates[0] < peak
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(peak * trained.target.optimizer.final_fraction)
    assert "held_out_bits_per_byte" in of_branch[-1]
    assert unfinished([trunk, branch]) == []
    assert trunk.run.held_out_texts() == branch.run.held_out_texts()


def test_a_ladder_that_was_killed_ends_as_one_that_was_not(trained: Ladder):
    config = trained.folder.parent / "run.py"
    killed = ladder_of(config, trained.folder.parent / "killed")
    trunk, branch = killed.trunks[0], killed.branches[0][1]
    finish_all_but([trunk, branch], killed, trained.trunks[0].run.held_out_texts())
    ladder_runs.save(killed, [0.5] * len(killed.rungs))
    flags = ["ladder", f"--config={config}", *SMALL, f"--to={killed.folder}", "--json"]
    process = command(*flags, devices=8, start_new_session=True)
    saved = lambda: any(path.name.isdigit() for path in trunk.run.checkpoints.glob("*"))
    kill_once(process, saved, trunk.run.folder)
    assert unfinished(killed.runs) == [trunk, branch]

    done = ziggurat(*flags, devices=8)
    assert done.returncode == 0, done.stderr
    events = [[event["event"] for event in read_events(planned.run.events)] for planned in (trunk, branch)]
    assert [of_run.count("start") for of_run in events] == [2, 1]
    for again, before in ((trunk, trained.trunks[0]), (branch, trained.branches[0][1])):
        found, expected = ([r["loss"] for r in metrics(planned.run.folder)] for planned in (again, before))
        assert found == expected
    result, points = json.loads(done.stdout), read_points(trained)
    assert [tuple(point[name] for name in Point._fields) for point in result["points"]] == points
    law = fit_points(points, resamples=0).law
    assert {name: of["value"] for name, of in result["law"].items()} == pytest.approx(law._asdict())


def test_all_rungs_are_evaluated_on_the_same_documents(config: Path, tmp_path: Path):
    config.write_text(config.read_text().replace('"batch_size": 8', '"batch_size": 256'))
    ladder = ladder_of(config, tmp_path / "to", least_rows=1)
    assert len({trunk.config.train.batch_size for trunk in ladder.trunks}) > 1
    texts = [choose_held_out(open_run_mixture(t.config, t.run), t.config.evaluation.max_bytes) for t in ladder.trunks]
    assert texts[0]
    assert all(text == texts[0] for text in texts)


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(config: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(many_runs, "train", None)
    command = ["ladder", f"--config={config}", *SMALL, f"--to={tmp_path / 'to'}", "--dry-run"]
    assert here(*command, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    ladder = ladder_of(config, tmp_path / "to")
    assert [rung["N"] for rung in plan["rungs"]] == [rung.N for rung in ladder.rungs]
    trained = sum(planned.config.train.num_steps * rung.step_tokens * 6 * rung.N
                  for rung, trunk, of in zip(ladder.rungs, ladder.trunks, ladder.branches, strict=True)
                  for planned in (trunk, *of))  # fmt: skip
    shared = sum(begin * rung.step_tokens * 6 * rung.N for rung in ladder.rungs for begin, _ in rung.branches)
    assert plan["flops"] == pytest.approx(trained - shared)
    assert here(*command) == 0
    text = capsys.readouterr().out
    assert f"{ladder.flops / ladder.target_flops:.1%} of the target's" in text
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["ladder.json"]
    # Nothing has begun, so another ladder may take its place.
    assert here(*command, "--rungs=4") == 0
    assert capsys.readouterr().out.count("rung-") == 4


def test_a_folder_of_another_ladder_is_refused(config: Path, tmp_path: Path, monkeypatch, capsys):
    # One run has ended, and the next is asked to stop.
    ended = tmp_path / "to" / "rung-1-trunk"
    monkeypatch.setattr(many_runs, "train", lambda planned: 75 if ended.exists() else finish(planned))
    command = ["ladder", f"--config={config}", *SMALL, f"--to={ended.parent}"]
    assert here(*command) == 75
    capsys.readouterr()
    for flags, words in (
        (["--rungs=4"], ["--rungs", "5", "4"]),
        (["--config.optimizer.learning_rate=2e-2"], ["optimizer.learning_rate", "0.01", "0.02"]),
    ):
        assert here(*command, *flags) == 2
        error = capsys.readouterr().err
        assert "holds another ladder:" in error
        assert words in [line.split() for line in error.splitlines()]
        assert "name another folder with --to=FOLDER" in error


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ({"bits": math.nan}, "rung-3-branch-2 diverged: its held-out loss is not finite"),
        ({"steps": 9}, "rung-3-branch-2 ended after 2,304 of its "),
        ({"texts": [HeldOutDocument("other")]}, "were evaluated on different documents"),
    ],
)
def test_a_run_that_says_nothing_of_the_law_is_named(
    ending: dict, words: str, config: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(
        many_runs, "train", lambda planned: finish(planned, **(ending if planned.name == "rung-3-branch-2" else {}))
    )
    assert here("ladder", f"--config={config}", *SMALL, f"--to={tmp_path / 'to'}") == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rungs=3"], "--rungs=3: give a whole number of at least 4"),
        (["--rungs=4.5", "--scale=nan"], "--scale=nan: give a number of at least 1"),
        (["--longest=0"], "--longest=0: give a number above 0"),
        (["--least-rows=x"], "--least-rows=x: give a whole number of at least 1"),
        (["--least-steps=2.5"], "--least-steps=2.5: give a whole number of at least 1"),
        (["--budget=many"], "--budget=many: give FLOPs, as in 1e19, or 30days"),
        (["--budget=-1e19"], "--budget=-1e19: give FLOPs"),
        (["--budget=3days"], "--budget=3days goes with --topology"),
        (["--budget=3dollars", "--topology=h100:1x8"], "--budget=3dollars goes with --price"),
        (["--budget=10"], "--budget=10 is 10 FLOPs, less than the "),
        (["--mfu=0.5", "--price=2"], "--price goes with --topology"),
        (["--topology=h100:1x8", "--mfu=1.5"], "--mfu=1.5: give a number above 0 and at most 1"),
        (["--topology=h100", "--mfu=0.5"], "--topology=h100: "),
        (["--scale=1e6"], "shrinks to no 5 sizes"),
        (REWARD, "model.reward_head: a reward model has no bits a byte to predict"),
        (["--config.data.validation_fraction=0"], "data.validation_fraction is 0, so there is no loss to predict"),
        (["--config.data.corpus=none"], "data.corpus is not given"),
        (["--config.checkpoint.dir=/tmp/x"], "checkpoint.dir: all runs would save to the same place"),
        (["--config.train.init_from=runs/x@3"], "train.init_from: a ladder is of new weights"),
        (["--config.optimizer.learning_rate=0"], "optimizer.learning_rate is 0"),
        (
            ['--config.optimizer.groups={{"vector": {{"schedule": "linear"}}}}'],
            "optimizer.groups['vector'] has its own schedule: trunks are constant",
        ),
        (["--to={config}/x"], "is a file; name another path"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    flags: list[str], words: str, config: Path, tmp_path: Path, capsys, timed
):
    to = f"--to={tmp_path / 'to'}"
    assert here("ladder", f"--config={config}", *SMALL, to, *(flag.format(config=config) for flag in flags)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert not (tmp_path / "to").exists()
    assert timed == []


def test_a_run_is_no_place_for_a_ladder(finished: Path, config: Path, capsys):
    assert here("ladder", f"--config={config}", *SMALL, f"--to={finished}") == 2
    assert "is a run itself; name another folder" in capsys.readouterr().err


def test_the_benchmark_measures_the_prediction_against_the_target(config: Path, tmp_path: Path, monkeypatch, capsys):
    text = config.read_text().replace('"model_dim": 32, "num_heads": 4', '"model_dim": 128, "num_heads": 8')
    config.write_text(text.replace('"num_steps": 12', '"num_steps": 3000'))
    # Losses of the law alone would leave nothing to the interval but the last digits of the fit.
    chance = random.Random(0)
    monkeypatch.setattr(many_runs, "train", lambda planned: finish(planned, noise=chance.gauss(0, 1e-4)))
    monkeypatch.setattr("sys.argv", ["ladder", f"--to={tmp_path / 'to'}", f"--config={config}", "--rungs=5"])
    benchmark.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures["errors"]) == 4
    for error in figures["errors"]:
        assert abs(error["error"]) < 1e-3
        assert error["holds"]
    last = figures["errors"][-1]
    assert figures["error_bits_per_byte"] == last["error"] == last["predicted"][0] - last["truth"]
    assert [len(held["errors"]) for held in figures["held_back"]] == [4]
    assert max(map(abs, figures["held_back"][0]["errors"])) < 1e-3
    folder = tmp_path / "to"
    target, rung = (Run(folder / name).load_config() for name in ("target-branch-4", "rung-5-trunk"))
    # The longest of the target's own runs is the config's, on the text that the rungs read.
    assert (target.train.num_steps, target.model.num_heads) == (3000, 8)
    assert target.data.num_streams == rung.data.num_streams


def test_the_benchmarks_prediction_holds_where_the_truth_lies_within_its_interval():
    fit = SimpleNamespace(predict=lambda N, D: Interval(2.0, 1.9, 2.2))
    result = cast(Result, SimpleNamespace(fit=fit, points=[]))
    for truth, holds in ((1.89, False), (1.9, True), (2.0, True), (2.2, True), (2.21, False)):
        [error] = benchmark.figures(result, [Point("target", 1e6, 1e7, truth)])["errors"]
        assert error["holds"] == holds


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.500"), (3, "3.00"), (999.6, "1.00k"), (12_345, "12.3k"), (1.234e9, "1.23G"), (1e15, "1.00e15")],
)
def test_large_numbers_are_short(value: float, text: str):
    assert short(value) == text
