"""The lease: one start at a time writes to a run's folder."""

import errno
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train.run.lease
from data.errors import InputError
from data.files.atomic import hidden
from tests.launch.small_run import ROOT
from train.run.lease import Lease, read_lease


def entry(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "begun": 0.0, "beats": 3} | changes))


def test_a_lease_is_taken_shows_a_heartbeat_and_is_released(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train.run.lease, "BEAT_SECONDS", 0.02)
    lease = Lease(tmp_path / "lease.json")
    lease.release()
    lease.take()
    assert lease.last_beat is None
    first = read_lease(tmp_path / "lease.json")
    deadline = time.monotonic() + 10
    while read_lease(tmp_path / "lease.json") == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_lease(tmp_path / "lease.json")["beats"] > first["beats"]
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_it(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(train.run.lease, "BEAT_SECONDS", 0.02)
    lease = Lease(tmp_path / "lease.json")
    lease.take()
    write = lease._write
    refused = threading.Event()

    def refuse_once(beats: int) -> None:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(beats)

    monkeypatch.setattr(lease, "_write", refuse_once)
    assert refused.wait(10)
    first = read_lease(tmp_path / "lease.json")
    deadline = time.monotonic() + 10
    while read_lease(tmp_path / "lease.json") == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_lease(tmp_path / "lease.json")["beats"] > first["beats"]
    assert "No space left on device" in caplog.text
    lease.release()


def test_a_holder_elsewhere_that_lives_keeps_it(tmp_path: Path):
    path = tmp_path / "lease.json"
    entry(path)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            entry(path, beats=4)

    with pytest.raises(InputError, match="is being written to by process 1 on elsewhere"):
        Lease(path).take(sleep)
    assert len(slept) == 2
    assert read_lease(path)["host"] == "elsewhere"


def test_a_holder_elsewhere_without_a_sign_of_life_loses_it(tmp_path: Path):
    path = tmp_path / "lease.json"
    entry(path)
    slept = []
    lease = Lease(path)
    lease.take(slept.append)
    # docs/operations.md promises half a minute.
    assert sum(slept) == 30
    assert lease.last_beat == pytest.approx(time.time(), abs=60)
    assert read_lease(path)["host"] != "elsewhere"
    lease.release()


HOLDER = """
import sys, time
from pathlib import Path
import train.run.lease
train.run.lease.BEAT_SECONDS = 0.05
train.run.lease.Lease(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_killed_holder_here_loses_it_at_once_and_a_living_one_keeps_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train.run.lease, "BEAT_SECONDS", 0.5)
    path = tmp_path / "lease.json"
    process = holder(path)
    try:
        with pytest.raises(InputError, match=f"process {process.pid} on "):
            Lease(path).take()
    finally:
        process.kill()
        process.wait()
    lease = Lease(path)
    lease.take(lambda _: pytest.fail("it need not wait"))
    lease.release()


def test_of_many_that_take_it_at_once_one_holds_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train.run.lease, "BEAT_SECONDS", 0.1)
    others = [b"", b"5", b'{"host": 1}', None]  # a killed process here is seen at once, the others after some beats
    process = subprocess.Popen(["true"])
    process.wait()
    dead = Lease(tmp_path / "none")._holder | {"pid": process.pid}
    for i, content in enumerate([*others, json.dumps(dead).encode()] * 2):
        path = tmp_path / f"{i}" / "lease.json"
        path.parent.mkdir()
        if content is not None:
            path.write_bytes(content)
        leases, refused, gate = [Lease(path) for _ in range(5)], [], threading.Barrier(5)

        def take(lease: Lease, gate=gate, refused=refused) -> None:
            gate.wait()
            try:
                lease.take()
            except InputError as error:
                refused.append(error)

        for j, lease in enumerate(leases):
            lease._holder["begun"] = j  # threads of one process are told apart
            lease._is_dead = lambda holder: holder is not None and holder["pid"] == process.pid
        threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 4
        for lease in leases:
            lease.release()
        assert list(path.parent.iterdir()) == []


def test_a_folder_that_was_made_for_it_goes_with_it_unless_something_was_written(tmp_path: Path, monkeypatch):
    for name in ("empty", "full"):
        lease = Lease(tmp_path / name / "lease.json")
        lease.take()
        if name == "full":
            (tmp_path / "full" / "config.json").touch()
        lease.release()
    monkeypatch.setattr(train.run.lease.os, "fsync", disk_is_full)
    lease = Lease(tmp_path / "no room" / "lease.json")
    with pytest.raises(OSError, match="No space"):
        lease.take()
    lease.release()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["config.json"]


def disk_is_full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_start_that_was_killed_while_it_took_the_lease_does_not_keep_it(tmp_path: Path):
    path = tmp_path / "lease.json"
    entry(path)
    [name] = {hidden(path, hashlib.sha256(path.read_bytes()).hexdigest()[:16], "new")}
    name.touch()
    lease = Lease(path)
    lease.take(lambda _: None)
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_of_another_boot_or_container_says_nothing(tmp_path: Path):
    path = tmp_path / "lease.json"
    mine = Lease(path)._holder
    for changes in ({"system": "another"}, {"system": None}, {"host": "elsewhere"}):
        path.write_text(json.dumps(mine | {"begun": 0.0, "beats": 1} | changes))
        slept: list[float] = []
        lease = Lease(path)
        lease.take(slept.append)
        assert len(slept) == train.run.lease.MISSING_BEATS
        lease.release()
    # Here this process has the number of one that has ended.
    path.write_text(json.dumps(mine | {"begun": 0.0}))
    lease = Lease(path)
    lease.take(lambda _: pytest.fail("it need not wait"))
    lease.release()


@pytest.mark.parametrize("content", [b"", b"5", b"[]", b"\xff", b'{"host": "a", "pid": "b"}', b'{"host": "a", "pid": 1'
    + b"0" * 20 + b"}", b"[" * 10**5, b'{"host": "a", "pid": -1}', b'{"pid": 1}'])  # fmt: skip
def test_a_damaged_lease_is_that_of_a_holder_elsewhere(tmp_path: Path, content: bytes):
    path = tmp_path / "lease.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is being written to by process 1 on elsewhere"):
        Lease(path).take(lambda _: entry(path))
    path.write_bytes(content)
    slept: list[float] = []
    lease = Lease(path)
    lease.take(slept.append)
    assert len(slept) == train.run.lease.MISSING_BEATS
    path.write_bytes(content)  # a holder writes it again
    lease._write(1)
    assert read_lease(path)["beats"] == 1
    lease.release()


def test_a_holder_that_finds_another_in_its_place_ends_at_once(tmp_path: Path):
    path = tmp_path / "lease.json"
    process = holder(path)
    entry(path)
    assert process.wait(20) == 1
    assert "process 1 on elsewhere has taken over" in process.stderr.read()
    assert read_lease(path)["host"] == "elsewhere"
