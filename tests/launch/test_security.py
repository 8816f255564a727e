"""What comes from others runs nothing and breaks out of nothing, and what is secret is not published."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import InputError
from launch.commands import parse
from launch.page.report_page import make_page
from launch.presets import ASKED_FOR, load_config
from launch.slurm import script
from tests.launch.small_run import TRAINING_ALONE, here, write_config
from train.config.config import NOT_KEPT, public
from train.config.reading import make_config
from train.run.events import Events
from train.run.folder import Run
from train.run.trackers import foreign_settings
from train.weights.load import open_weights
from train.weights.model_card import model_card


@pytest.fixture
def others(tmp_path: Path, finished: Path) -> Path:
    """A run from somebody else, whose config.json would run a command and code, and send figures away."""
    folder = tmp_path / "others"
    shutil.copytree(finished, folder)
    config = json.loads((folder / "config.json").read_text())
    config["train"] |= {"on_event": f"touch {tmp_path}/pwned", "wandb": "theirs"}
    config["evaluation"] |= {"tasks": "theirs", "task_dir": str(tmp_path)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("step", ["", "@8"])
def test_nothing_that_runs_is_taken_from_a_runs_folder(step: str, others: Path, caplog):
    config = load_config(f"{others}{step}", {})
    values = {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in ASKED_FOR}
    assert set(values.values()) == {None}
    # Only a run with rewards has one: see test_grpo.
    for name in {*ASKED_FOR} - {"objective.reward"}:
        assert f"to have it: --config.{name}=" in caplog.text
    assert f"'touch {others.parent}/pwned'" in caplog.text
    given = load_config(f"{others}{step}", {"train.on_event": "true"})
    assert given.train.on_event == "true"


def test_a_fork_of_somebody_elses_run_runs_nothing_of_theirs(others: Path, tmp_path: Path):
    assert here("pretrain", f"--config={others}@8", f"--config.train.run_dir={tmp_path / 'mine'}",
                "--config.checkpoint.export=false") == 0  # fmt: skip
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", ["wandb", ".wandb", "profile/wandb"])
def test_no_runs_folder_says_where_figures_go(place: str, others: Path, monkeypatch, capsys):
    settings_file = others / place / "settings"
    settings_file.parent.mkdir(parents=True)
    settings_file.write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    monkeypatch.chdir(settings_file.parent.parent)
    assert here("pretrain", f"--config={others}", "--config.train.num_steps=13", "--config.train.wandb=mine") == 2
    assert f"{settings_file}: a run's folder cannot say where figures go" in capsys.readouterr().err
    monkeypatch.chdir(others.parent)
    assert foreign_settings(make_config({"train": {"wandb": "mine"}}), Run(others)) == []


@pytest.mark.parametrize("name", ["config.json", "lease.json", "metrics.jsonl", "events.jsonl", "held_out.jsonl"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_in_a_runs_folder_changes_no_file_of_the_user(
    name: str, is_there: bool, others: Path, tmp_path: Path, capsys
):
    mine = tmp_path / "mine"
    if is_there:
        shutil.copy(others / name if (others / name).exists() else others / "config.json", mine)
    before = mine.read_bytes() if is_there else None
    (others / name).unlink(missing_ok=True)
    (others / name).symlink_to(mine)
    assert here("pretrain", f"--config={others}", "--config.train.num_steps=13") == 2
    assert f"{others / name}" in capsys.readouterr().err
    assert (mine.read_bytes() if mine.exists() else None) == before


def test_a_config_file_is_named_as_one(others: Path):
    with pytest.raises(InputError, match=r"no preset, run or file that ends in \.py"):
        load_config(str(others / "config.json"), {})


def test_secrets_are_in_nothing_that_a_run_keeps_or_publishes(finished: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    url = "http://alice:s3cret1@host/c.jsonl?X-Amz-Signature=s3cret2"
    values = json.loads((folder / "config.json").read_text())
    values["train"]["on_event"] = "curl https://hooks.example.org/s3cret3"
    for corpus in (url, {"web": {"corpus": url}, "code": {"corpus": "https://key-s3cret4@host/d.jsonl"}}):
        values["data"]["corpus"] = corpus
        # As an older version has kept it.
        (folder / "config.json").write_text(json.dumps(values))
        run = Run(folder)
        Events(run.events).write("fault", error=f"RemoteError: {url} cannot be read", step=12)
        texts = [make_page(run), model_card(open_weights(str(folder)), run), run.events.read_text()]
        run.save_config(make_config(values))
        texts += [(folder / "config.json").read_text(), str(public(make_config(values)))]
        assert [text for text in texts if "s3cret" in text] == []
        assert run.load_config().train.on_event == NOT_KEPT
    assert here("inspect", "data", folder, "--step=1") == 2


def test_a_model_card_takes_names_for_text(finished: Path, tmp_path: Path):
    folder = tmp_path / "a|b<img src=x>\nc"
    shutil.copytree(finished, folder)
    values = json.loads((folder / "config.json").read_text())
    values["data"]["corpus"] = {"a | b": {"corpus": "x"}, "<img src=y>": {"corpus": "y"}}
    (folder / "config.json").write_text(json.dumps(values))
    card = model_card(open_weights(str(folder)), Run(folder))
    assert "# a\\|b\\<img src=x\\> c\n" in card
    assert "| corpus | a \\| b, \\<img src=y\\> |" in card


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda t: "/" not in t and t != "~"))
def test_no_name_adds_a_line_to_a_script(name: str):
    def lines(run_dir: str, partition: str) -> list[str] | None:
        try:
            flags = ["launch", "slurm", f"--partition={partition}", "--", "pretrain", "--config=tiny"]
            arguments = parse([*flags, f"--config.train.run_dir={run_dir}"])[1]
            return script(arguments, Path("/work")).splitlines()
        except InputError:
            return None

    usual = lines("x", "y")
    assert usual is not None
    for found in (lines(f"x{name}", "y"), lines("x", f"y{name}")):
        assert found is None or len(found) == len(usual)
        for line in found or []:
            if line.startswith("#SBATCH"):
                assert len(shlex.split(line.removeprefix("#SBATCH "))) == 1


@pytest.mark.parametrize("name", [".", "/", "50%j"])
def test_a_job_and_its_log_have_a_plain_name(name: str):
    arguments = parse(["launch", "slurm", "--", "pretrain", "--config=tiny", f"--config.train.run_dir={name}"])[1]
    lines = script(arguments, Path("/work")).splitlines()
    [job] = [line for line in lines if "--job-name=" in line]
    [log] = [line for line in lines if "--output=" in line]
    assert job.partition("=")[2] not in ("", "''")
    assert log.partition("=")[2].replace("%%", "").count("%") == 1


LAUNCHERS = [
    ["launch", "slurm", "--", "pretrain", "--config=tiny"],
    ["launch", "kubernetes", "--topology=h100:1x8", "--image=i", "--volume=c:/runs", "--", "pretrain", "--config=tiny",
     "--config.train.run_dir=/runs/x"],
]  # fmt: skip


@pytest.mark.parametrize("command", LAUNCHERS, ids=["slurm", "kubernetes"])
def test_output_replaces_only_what_the_same_command_has_made(command: list[str], tmp_path: Path, capsys):
    def write(file: Path) -> int:
        return here(*command[:2], f"--output={file}", *command[2:])

    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    assert write(tmp_path / "README.md") == write(tmp_path / "link") == write(tmp_path) == 2
    assert (tmp_path / "README.md").read_text() == "mine"
    assert write(tmp_path / "new" / "job") == 0
    made = (tmp_path / "new" / "job").read_text()
    assert write(tmp_path / "new" / "job") == 0
    assert (tmp_path / "new" / "job").read_text() == made
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["job"]
    assert write(Path("~nosuchuser/job")) == write(Path("/proc/no/such")) == write(Path("")) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_with_a_hook_resumes_by_its_folder_and_the_same_flag(tmp_path: Path):
    config, hook = write_config(tmp_path), f"--config.train.on_event=cat >> {tmp_path}/heard"
    assert here("pretrain", f"--config={config}", hook, "--config.train.num_steps=4", *TRAINING_ALONE) == 0
    heard = (tmp_path / "heard").read_text()
    assert here("pretrain", f"--config={tmp_path / 'run'}", hook, "--config.train.num_steps=8") == 0
    assert len((tmp_path / "heard").read_text()) > len(heard)
