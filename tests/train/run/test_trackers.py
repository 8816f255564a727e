"""Numbers of steps in the files of TensorBoard and of Weights & Biases."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.errors import InputError
from tests.peers import require
from train.config.config import Config
from train.config.reading import make_config
from train.run.events import Events
from train.run.folder import Run
from train.run.step_log import StepLog
from train.run.trackers import PACKAGES, missing_packages, open_writers

RECORD = {
    "step": 1, "time": 1.8e9, "loss": 0.5, "sample": "text",
    "watch": {"largest_logit": [1.0, 2.0], "grad_norm": {"norm.scale": 0.5, "blocks.attention.key": [0.1, 0.2]}},
}  # fmt: skip
NAMES = {
    "loss", "watch/largest_logit/0", "watch/largest_logit/1", "watch/grad_norm/norm.scale",
    "watch/grad_norm/blocks.attention.key/0", "watch/grad_norm/blocks.attention.key/1",
}  # fmt: skip


def begin(folder: Path) -> Run:
    """A run's folder after the first event of a start."""
    folder.mkdir(exist_ok=True)
    run = Run(folder)
    Events(run.events).write("start", step=0, host="node1", pid=7)
    return run


def log_steps(run: Run, config: Config, after: int, last: int) -> None:
    log = StepLog(run.metrics, after, open_writers(config, run, after))
    for step in range(after + 1, last + 1):
        log.write(RECORD | {"step": step})
    log.close()


def test_numbers_go_to_tensorboard(tmp_path: Path):
    require("tensorboardX")
    run = begin(tmp_path / "run")
    log_steps(run, make_config({"train": {"tensorboard": True}}), 0, 1)
    events = next((run.folder / "tensorboard").iterdir()).read_bytes()
    assert all(name.encode() in events for name in NAMES)
    assert b"sample" not in events
    assert b"time" not in events


def test_tensorboard_shows_each_step_once_over_all_starts(tmp_path: Path):
    """It leaves out what earlier starts have written from the step on that a start names."""
    require("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    run = begin(tmp_path / "run")
    log_steps(run, make_config({"train": {"tensorboard": True}}), 8, 9)
    content = next((run.folder / "tensorboard").iterdir()).read_bytes()
    events = []
    while content:
        (length,) = struct.unpack_from("<Q", content)  # a checksum of four bytes follows, and another one at the end
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert [event.step for event in events if event.HasField("session_log")] == [9]
    assert {event.step for event in events if event.HasField("summary")} == {9}


def log_records(content: bytes) -> Iterator[bytes]:
    """Reads a file of Weights & Biases: a log like LevelDB's, in blocks of 32 KiB, after seven bytes of its own.

    Its last record may not be whole yet.
    """
    at = 7
    whole = b""
    while len(content) - at >= 7:
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if len(content) - at < 7 + length:
            return
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_numbers_go_to_one_run_of_weights_and_biases_over_all_starts(tmp_path: Path, monkeypatch, capfd):
    require("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config({"train": {"wandb": "ziggurats", "num_steps": 9}})

    def kept(path: Path) -> tuple[str, dict[int, dict[str, str]]]:
        """The run's id, and the values of each step."""
        # Another process writes the file, and is not waited for.
        deadline = time.monotonic() + 60
        whole = False
        while not whole:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(path.read_bytes())]
            whole = any(record.HasField("exit") for record in records)
        steps, name = {}, ""
        for record in records:
            if record.HasField("run"):
                name = record.run.run_id
                assert record.run.project == "ziggurats"
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                steps[record.history.step.num] = items
        return name, steps

    run = begin(tmp_path / "run")
    log_steps(run, config, 0, 3)
    begin(tmp_path / "run")
    log_steps(run, config, 2, 4)
    one, two = (kept(path) for path in sorted((run.folder / "wandb").glob("offline-run-*/*.wandb")))
    assert one[0] == two[0]
    assert (list(one[1]), list(two[1])) == ([1, 2, 3], [3, 4])
    assert one[1][1].keys() >= NAMES
    assert one[1][1]["loss"] == "0.5"
    assert not {"sample", "time"} & one[1][1].keys()
    assert capfd.readouterr().out == ""

    other = begin(tmp_path / "other")
    log_steps(other, config, 0, 1)
    assert kept(next((other.folder / "wandb").glob("offline-run-*/*.wandb")))[0] != one[0]


def test_a_user_who_is_not_logged_in_gets_an_error(tmp_path: Path, monkeypatch):
    require("wandb").teardown()  # It has read the environment once.
    monkeypatch.setenv("WANDB_MODE", "online")
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="train.wandb = ziggurats: .*WANDB_MODE=offline"):
        open_writers(make_config({"train": {"wandb": "ziggurats"}}), begin(tmp_path / "run"), 0)


def test_a_package_that_is_missing_is_named(monkeypatch):
    config = make_config({"train": {"tensorboard": True, "wandb": "ziggurats"}})
    monkeypatch.setattr("train.run.trackers.importlib.util.find_spec", lambda name: None)
    assert missing_packages(config) == [
        f"train.{name} needs the package {package}: pip install -e '.[{name}]'" for name, package in PACKAGES.items()
    ]
    assert missing_packages(Config()) == []
