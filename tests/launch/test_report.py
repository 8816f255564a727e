"""`ziggurat report`: a page of a real run, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.page.chart import MEASURES
from tests.launch.small_run import here, metrics


def test_a_run_has_a_page_whose_path_goes_to_standard_output(finished: Path, tmp_path: Path, capsys):
    output = tmp_path / "new folder" / "page.html"
    for _ in range(2):
        assert here("report", finished, f"--output={output}") == 0
        assert capsys.readouterr().out == f"{output}\n"
    page = output.read_text()
    assert ">finished<" in page
    assert page.count("<figure data-chart") == len(MEASURES)
    readouts = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    records = metrics(finished)
    assert readouts["charts"]["loss"]["values"] == [f"{record['loss']:.4f}" for record in records]
    assert readouts["charts"]["validation_bits_per_byte"]["steps"] == [1, 6, 12]
    assert not (finished / "report.html").exists()


def test_several_runs_have_one_page_of_their_curves(finished: Path, tmp_path: Path, capsys, monkeypatch):
    others = [shutil.copytree(finished, tmp_path / name / "run") for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert here("report", finished, *others) == 0
    assert capsys.readouterr().out == "compare.html\n"
    page = (tmp_path / "compare.html").read_text()
    for name in (f"{finished.parent.name}/run", "a/run", "b/run"):
        assert f"</i>{name}</span>" in page
    readouts = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert [line["group"] for line in readouts["charts"]["loss"]] == [0, 1, 2]
    assert readouts["between"] == [0, 12 * 8 * 32]
    for arguments, words in (((finished, finished), "is named twice"), ((finished, tmp_path), "has no config.json")):
        assert here("report", *arguments, f"--output={tmp_path / 'new.html'}") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{dir}/none"], "there is no such folder"),
        (["{dir}"], "has no config.json: it is neither a run nor exported weights"),
        (["{run}/export"], "is not the config of a run of this version"),
        (["{run}", "--output={run}/config.json"], "config.json exists and is no report; name another file"),
        (["{run}", "--output={run}"], "exists and is no report; name another file"),
        (["{run}", "--output={run}/config.json/page.html"], "config.json is a file; name another path"),
    ],
)
def test_what_is_no_run_and_no_place_for_a_page_is_refused(
    arguments: list[str], words: str, finished: Path, tmp_path: Path, capsys
):
    before = (finished / "config.json").read_text()
    assert here("report", *(word.format(dir=tmp_path, run=finished) for word in arguments)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert (finished / "config.json").read_text() == before
