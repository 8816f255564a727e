"""The scripts of examples/ run as their docstrings say, and print what they promise."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.small_run import ROOT, environment, here, write_config, write_corpus

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def printed(example: str, *arguments: object) -> str:
    """Standard output of an example in a process of its own."""
    command = [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short_and_opens_with_its_command(example: Path):
    text = example.read_text()
    assert len(text.splitlines()) <= 50
    assert f"python examples/{example.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_batches_are_shown_whose_targets_are_the_next_tokens(tmp_path: Path):
    out = printed("look_at_batches.py", write_corpus(tmp_path / "corpus.jsonl"))
    assert "700 documents" in out
    rows = re.findall(r"  input   '(.*)'\n  target  '(.*)'\n", out)
    assert len(rows) == 8
    assert all(target[:20] in text for text, target in rows)


def test_gradient_steps_learn_to_count():
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed("gradient_step.py"))]
    assert losses[0] > 4
    assert losses[-1] < 0.1


def test_exported_weights_give_probabilities_and_text(tmp_path: Path):
    assert here("pretrain", f"--config={write_config(tmp_path)}", "--config.train.num_steps=1",
                "--config.data.validation_fraction=0") == 0  # fmt: skip
    out = printed("sample.py", tmp_path / "run" / "export", "the cat")
    shares = [float(share) for share in re.findall(r"^ *(\d+\.\d)%  '", out, re.M)]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.1
    assert len(set(re.findall(r"^\[\d\] (the cat.*)$", out, re.M))) == 3
