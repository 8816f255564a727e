"""Logs with one line a step."""

import json
from pathlib import Path

from train.run.step_log import StepLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_after_a_restart_each_step_has_one_line_and_a_torn_line_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 8)) + '{"step": 8, "lo')
    file = StepLog(path, step=4)
    assert steps(path) == [1, 2, 3, 4]
    file.write({"step": 5, "loss": 0.5})
    assert steps(path) == [1, 2, 3, 4, 5]
    file.close()
    assert path.read_text().count("\n") == 5
