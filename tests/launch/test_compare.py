"""`ziggurat compare`: ordinary runs that go on after a kill, equal time, and what it refuses."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from data.errors import InputError
from launch import compare_runs, many_runs, step_times
from launch.experiment import read_experiment
from launch.many_runs import folder_problems, is_finished, plan_run, train_all, train_each, unfinished
from tests.launch.small_run import TRAINING_ALONE, back_to, command, here, kill_once, metrics, write_config, ziggurat
from tests.test_docs import ziggurat_arguments
from train.planning import this_machine
from train.run.events import read_events
from train.run.folder import Run

TWO = "[variants.plain]\n[variants.fast]\noptimizer.learning_rate = 3e-2\n"


def write(folder: Path, variants: str = TWO, head: str = "") -> Path:
    """An experiment with a small run's config."""
    if not (folder / "run.py").exists():
        write_config(folder)
    file = folder / "experiment.toml"
    file.write_text(f'config = "{folder / "run.py"}"\n{head}\n{variants}')
    return file


def as_planned(finished: Path, folder: Path, **overrides: str) -> many_runs.PlannedRun:
    """A copy of the finished run in `folder`, and the plan that it was begun with, with other values of fields."""
    shutil.copytree(finished, folder)
    return plan_run(
        folder, str(finished.parent / "run.py"), {name.replace("__", "."): v for name, v in overrides.items()}
    )


def test_after_a_kill_the_same_command_goes_on_and_finds_what_is_finished(finished: Path, tmp_path: Path, capsys):
    file, to = write(tmp_path), tmp_path / "runs"
    # The same text, so that `plain` is the finished run again.
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path / "corpus.jsonl")
    timed = {"variants": compare_runs.fingerprint(read_experiment(file)), "seconds": {"plain": 0.1, "fast": 0.1}}
    to.mkdir()
    (to / "step_seconds.json").write_text(json.dumps(timed))
    # `fast` has ended, a little better than `plain` will.
    expected = metrics(finished)
    ended = compare_runs.planned_runs(read_experiment(file), to, only_planned=True)["fast", 0]
    shutil.copytree(finished, ended.run.folder)
    ended.run.save_config(ended.config.resolved(ended.run.load_config().model.vocab_size))
    last = expected[-1]["held_out_bits_per_byte"] - 0.125
    better = [*expected[:-1], expected[-1] | {"held_out_bits_per_byte": last}]
    ended.run.metrics.write_text("".join(json.dumps(record) + "\n" for record in better))
    process = command("compare", file, f"--to={to}", "--json", devices=8, start_new_session=True)
    plain = Run(to / "plain-0")
    kill_once(process, lambda: (plain.checkpoints / "4").exists(), plain.folder)
    assert not is_finished(plain)

    # In a process of its own, as JAX has threads in this one, which must not be forked.
    done = ziggurat("compare", file, f"--to={to}", "--json", devices=8)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert is_finished(plain)
    assert len([event for event in read_events(plain.events) if event["event"] == "start"]) == 2
    assert [record["loss"] for record in metrics(plain.folder)] == [record["loss"] for record in expected]
    assert found["variants"]["plain"]["bits_per_byte"] == [expected[-1]["held_out_bits_per_byte"]]
    assert found["variants"]["fast"]["bits_per_byte"] == [last]
    difference = found["variants"]["fast"]["difference"]
    assert difference["mean"] == pytest.approx(-0.125)
    assert difference["margin"] is None
    assert found["timed_in"] == "turns"
    assert found["same_held_out"] is True
    page = (to / "compare.html").read_text()
    assert ">fast<" in page
    assert "a step: the fastest of several turns" in page

    before = {path: path.stat().st_mtime_ns for path in to.rglob("*.jsonl")}
    assert here("compare", file, f"--to={to}") == 0
    table = capsys.readouterr().out
    assert f"{last:.4f}" in table
    assert "one seed" in table
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*.jsonl")} == before
    assert here("compare", file, f"--to={to}", "--print-commands") == 0
    assert capsys.readouterr().out == ""

    # A learning rate may change on resume, but then the run would be of neither variant.
    write(tmp_path, TWO.replace("3e-2", "2e-2"))
    assert here("compare", file, f"--to={to}") == 2
    error = capsys.readouterr().err
    assert "fast-0 holds a run with other settings:" in error
    assert "optimizer.learning_rate  0.03    0.02" in error
    assert {path: path.stat().st_mtime_ns for path in to.rglob("*.jsonl")} == before


def test_only_a_run_of_the_same_settings_is_taken_for_a_variants(finished: Path, tmp_path: Path):
    assert folder_problems([as_planned(finished, tmp_path / "same")]) == []
    assert folder_problems([as_planned(finished, tmp_path / "free", **{"evaluation.every_steps": "3"})]) == []
    for i, (name, value) in enumerate(
        {"train.seed": "1", "train.num_steps": "13", "optimizer.beta1": "0.5", "data.corpus": str(tmp_path)}.items()
    ):
        [problem] = folder_problems([as_planned(finished, tmp_path / str(i), **{name: value})])
        assert f"  {name}" in problem
        assert "name another variant or folder, or remove that run" in problem
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    config = str(finished.parent / "run.py")
    [problem] = folder_problems([plan_run(tmp_path / "other", config, {})])
    assert "holds other things than a run" in problem
    assert folder_problems([plan_run(tmp_path / "new", config, {})]) == []


def test_runs_are_trained_in_order_until_one_fails(finished: Path, tmp_path: Path, monkeypatch, capsys):
    config, done = str(finished.parent / "run.py"), as_planned(finished, tmp_path / "done")
    runs = [done, *(plan_run(tmp_path / name, config, {}) for name in "abc")]
    assert unfinished(runs) == runs[1:]
    begun: list[str] = []
    monkeypatch.setattr(many_runs, "train", lambda planned: begun.append(planned.name) or 7 * (planned.name == "b"))
    assert train_all(runs) == 7
    assert begun == ["a", "b"]
    assert "b: ended with status 7; the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(many_runs, "train", lambda planned: 0)
    assert train_all(runs) == 0
    with pytest.raises(InputError, match="holds a run with other settings"):
        train_all([done._replace(config=plan_run(done.run.folder, config, {"train.seed": "5"}).config)])


def test_the_others_are_trained_where_one_fails_but_not_where_this_process_is_asked_to_stop(
    finished: Path, tmp_path: Path, monkeypatch
):
    runs = [plan_run(tmp_path / name, str(finished.parent / "run.py"), {}) for name in "abcd"]
    statuses, begun = {"a": 0, "b": 7, "c": 75, "d": 0}, []
    monkeypatch.setattr(many_runs, "train", lambda planned: begun.append(planned.name) or statuses[planned.name])
    assert train_each(runs) == {"b": 7, "c": 75}
    assert begun == ["a", "b", "c"]


def test_a_variant_that_fails_has_no_figures_and_the_others_have_theirs(
    finished: Path, tmp_path: Path, monkeypatch, capsys
):
    file, to = write(tmp_path, "[variants.bad]\n[variants.good]\n[variants.fine]", "seeds = [0, 1]"), tmp_path / "runs"
    monkeypatch.setattr(compare_runs, "check_devices", lambda _: None)

    def train(planned: many_runs.PlannedRun) -> int:
        if planned.name == "good-1" and was_stopped:
            return 75
        if planned.name == "bad-1":
            return 9
        shutil.copytree(finished, planned.run.folder)
        planned.run.save_config(planned.config.resolved(planned.run.load_config().model.vocab_size))
        return 0

    monkeypatch.setattr(many_runs, "train", train)
    was_stopped = True
    assert here("compare", file, f"--to={to}") == 75
    assert capsys.readouterr().out == ""
    was_stopped = False
    assert here("compare", file, f"--to={to}") == 9
    table = capsys.readouterr().out
    last = metrics(finished)[-1]["held_out_bits_per_byte"]
    rows = {name: words for name, *words in map(str.split, table.splitlines()[:4])}
    assert rows["bad"] == ["n/a"] * 7
    assert rows["good"][:3] == [f"{last:.4f}", "±", "0.0000"]
    assert "n/a: bad-1 ended with status 9; the same command goes on from there" in table
    assert "n/a: bad-1 ended with status 9" in (to / "compare.html").read_text()
    # The baseline has failed, or another.
    assert here("compare", file, f"--to={to}", "--json") == 9
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == {"bad-1": 9}
    assert found["variants"]["bad"] is None
    assert found["variants"]["good"]["difference"] is None
    assert found["timed_in"] == "runs"
    other = write(tmp_path, "[variants.good]\n[variants.bad]\n[variants.fine]", "seeds = [0, 1]")
    assert here("compare", other, f"--to={to}", "--json") == 9
    assert json.loads(capsys.readouterr().out)["variants"]["fine"]["difference"]["mean"] == 0


def test_a_run_that_has_read_its_corpus_to_the_end_is_finished_without_its_last_event(finished: Path, tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text("".join((finished.parent / "corpus.jsonl").open().readlines()[:90]))
    flags = ["--config.data.epochs=1", "--config.train.num_steps=2000",
             f"--config.tokenizer.path={finished / 'tokenizer'}", *TRAINING_ALONE]  # fmt: skip
    assert here("pretrain", f"--config={write_config(tmp_path)}", *flags) == 0
    run = Run(tmp_path / "run")
    steps = sorted(int(folder.name) for folder in run.checkpoints.iterdir())
    assert steps[-1] < 2000
    lines = run.events.read_text().splitlines(keepends=True)
    assert '"end"' in lines[-1]
    run.events.write_text("".join(lines[:-1]))
    assert is_finished(run)
    assert not is_finished(Run(back_to(steps[-2], run.folder, tmp_path / "earlier")))
    (run.checkpoints / str(steps[-1]) / "progress" / "metadata").write_text("{")
    assert not is_finished(run)


def test_a_run_that_is_asked_to_stop_ends_the_others_too(finished: Path, tmp_path: Path, monkeypatch):
    planned = plan_run(tmp_path / "a", str(finished.parent / "run.py"), {})
    for end, status in (((0, True), 75), ((75, True), 75), ((130, True), 75), ((0, False), 0), ((2, False), 2)):
        monkeypatch.setattr(many_runs, "run_processes", lambda *_, end=end, **__: many_runs.Exit(*end))
        assert many_runs.train(planned) == status


def test_variants_of_equal_time_have_as_many_steps_as_the_baselines_time_allows(tmp_path: Path, monkeypatch, capsys):
    file, to = write(tmp_path, head='equal = "time"\nseeds = [0, 1]\nbaseline = "plain"'), tmp_path / "runs"
    monkeypatch.setattr(compare_runs, "step_seconds", lambda *_: {"plain": 0.2, "fast": 0.3})
    experiment = read_experiment(file)
    runs = compare_runs.planned_runs(experiment, to)
    steps = {place: planned.config.train.num_steps for place, planned in runs.items()}
    assert steps == {("plain", 0): 12, ("fast", 0): 8, ("plain", 1): 12, ("fast", 1): 8}
    assert not to.exists()
    # Once a run has begun, its number of steps stays, whatever another measurement would say.
    fast = runs["fast", 1]
    fast.run.folder.mkdir(parents=True)
    fast.run.save_config(fast.config.resolved(512))
    monkeypatch.setattr(compare_runs, "step_seconds", lambda *_: {"plain": 0.2, "fast": 0.1})
    again = compare_runs.planned_runs(experiment, to)
    assert {place: planned.config.train.num_steps for place, planned in again.items()} == steps
    shutil.rmtree(to)
    monkeypatch.setattr(compare_runs, "step_seconds", lambda *_: {"plain": 0.2, "fast": 100.0})
    text = write(tmp_path, TWO + "optimizer.warmup_steps = 5", 'equal = "time"')
    assert here("compare", text, f"--to={to}") == 2
    assert "variant fast in 1 steps: optimizer.warmup_steps = 5" in capsys.readouterr().err


def test_steps_are_timed_by_a_process_of_their_own_and_once(tmp_path: Path, monkeypatch):
    experiment = read_experiment(write(tmp_path))
    seconds = compare_runs.step_seconds(experiment, tmp_path / "runs")
    assert seconds.keys() == {"plain", "fast"}
    assert all(0 < s < 60 for s in seconds.values())
    monkeypatch.setattr(step_times, "multiprocessing", None)
    assert compare_runs.step_seconds(experiment, tmp_path / "runs") == seconds
    other = read_experiment(write(tmp_path, TWO.replace("3e-2", "2e-2")))
    assert compare_runs.known_step_seconds(other, tmp_path / "runs") == {}
    (tmp_path / "runs" / "step_seconds.json").write_text("{")
    with pytest.raises(InputError, match="remove it, and they are timed again"):
        compare_runs.known_step_seconds(experiment, tmp_path / "runs")


def test_one_state_at_a_time_is_in_memory_while_steps_are_timed(tmp_path: Path, monkeypatch):
    configs = read_experiment(write(tmp_path, TWO + "[variants.third]")).configs
    held: list[int] = []

    def step(state: dict, batch: dict) -> tuple[dict, dict]:
        held.append(sum("embedding" in str(path) for path, _ in jax.tree.leaves_with_path(state)))
        shape = next(x.shape for path, x in jax.tree.leaves_with_path(state["weights"]) if "embedding" in str(path))
        held[-1] = sum(x.shape == shape for x in jax.live_arrays()) / held[-1]
        return state, {}

    monkeypatch.setattr(this_machine, "make_train_step", lambda *_: step)
    seconds = this_machine.steps_in_turns({name: config.resolved(512) for name, config in configs.items()})
    assert seconds.keys() == configs.keys()
    assert max(held) == min(held)


def test_steps_are_timed_first_only_where_their_number_follows_from_it(tmp_path: Path, monkeypatch):
    """All variants may not fit into memory one by one in a process that times them, and tokens need no time."""
    monkeypatch.setattr(compare_runs, "check_devices", lambda _: None)
    monkeypatch.setattr(compare_runs, "time_steps", lambda _: pytest.fail("timed"))
    for equal in ("tokens", "nothing"):
        file = write(tmp_path, head=f'equal = "{equal}"')
        assert len(compare_runs.planned_runs(read_experiment(file), tmp_path / "runs")) == 2
    monkeypatch.setattr(compare_runs, "time_steps", lambda configs: dict.fromkeys(configs, 0.1))
    assert compare_runs.planned_runs(read_experiment(write(tmp_path, head='equal = "time"')), tmp_path / "runs")
    assert (tmp_path / "runs" / "step_seconds.json").exists()


def test_what_does_not_fit_the_devices_is_said_of_all_variants_before_anything_trains(tmp_path: Path, capsys):
    file = write(tmp_path, "[variants.a]\nmesh.data = 3\n[variants.b]\nmesh.tensor = 5\n")
    assert here("compare", file, f"--to={tmp_path / 'runs'}") == 2
    error = capsys.readouterr().err
    assert "a: the mesh" in error or "a: mesh" in error
    assert "b: the mesh" in error or "b: mesh" in error
    assert not (tmp_path / "runs").exists()


def test_printed_commands_are_those_of_its_runs(tmp_path: Path, capsys):
    file = write(tmp_path, head="seeds = [0, 7]")
    assert here("compare", file, f"--to={tmp_path / 'runs'}", "--print-commands") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    [words] = ziggurat_arguments(lines[-1])
    assert words[0] == "pretrain"
    assert "--config.train.seed=7" in words
    assert "--config.optimizer.learning_rate=0.03" in words
    assert f"--config.train.run_dir={tmp_path / 'runs' / 'fast-7'}" in words
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{dir}/none.toml"], "none.toml: there is no such file; give an experiment"),
        (["{dir}"], "is no regular file"),
        (["{file}", "--json", "--print-commands"], "--json has no effect with --print-commands"),
        (["{file}", "--to={run}"], "is a run itself; name another folder"),
        (["{file}", "--to={file}/x"], "is a file; name another path"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], words: str, finished: Path, tmp_path: Path, capsys):
    places = {"dir": tmp_path, "file": write(tmp_path), "run": finished}
    assert here("compare", *(flag.format(**places) for flag in flags)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
