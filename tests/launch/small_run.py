"""A run small enough for a test: a config file and a corpus, and the command line in this process or another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.cli import main
from train.run.events import read_events

ROOT = Path(__file__).resolve().parent.parent.parent

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "num_kv_heads": 4, "feedforward_dim": 64,
                    "compute_dtype": "float32"}
    config.data = {"corpus": CORPUS, "segment_length": 32, "validation_fraction": 0.1}
    config.tokenizer = {"vocab_size": 512}
    config.optimizer = {"learning_rate": 1e-2}
    config.train = {"run_dir": RUN_DIR, "num_steps": 12, "batch_size": 8, "log_every_steps": 1}
    config.checkpoint = {"every_steps": 4}
    config.evaluation = {"every_steps": 6, "max_bytes": 3000, "loop_bytes": 1000, "sample_tokens": 8}
    return config
"""

# For tests in which no evaluation, sample or export has a part: they would compile two programs more in each process.
TRAINING_ALONE = ("--config.data.validation_fraction=0", "--config.checkpoint.export=false")


def write_corpus(path: Path) -> Path:
    """Writes about 120 kB of documents from which a model can learn something."""
    subjects, verbs = ["the cat", "a dog", "my bird", "one fish"], ["eats", "sees", "likes", "hears"]
    documents = [
        " ".join(f"{subjects[(i * j) % 4]} {verbs[(i + j * j) % 4]} {subjects[(i + j) % 4]}." for j in range(4 + i % 9))
        for i in range(700)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def write_config(folder: Path, run: str = "run") -> Path:
    """A config file whose run is `folder/run`, and its corpus."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    path = folder / f"{run}.py"
    path.write_text(CONFIG.replace("CORPUS", repr(str(corpus))).replace("RUN_DIR", repr(str(folder / run))))
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of another process with this number of virtual devices, which compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def command(*arguments: object, devices: int = 1, **popen: object) -> subprocess.Popen:
    """Starts `ziggurat ARGUMENTS` as a process of its own, with this number of virtual devices."""
    arguments = (sys.executable, "-m", "launch.cli", *map(str, arguments))
    return subprocess.Popen(arguments, env=environment(devices), text=True, **popen)  # type: ignore[call-overload,no-any-return]


def ziggurat(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs `ziggurat ARGUMENTS` to its end."""
    process = command(*arguments, devices=devices, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def kill_once(process: subprocess.Popen, has_come: Callable[[], bool], run: Path) -> None:
    """Kills the group of a command's process once something has come; the run that it trains must end with it."""
    deadline = time.monotonic() + 300
    while not has_come():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pid = [event for event in read_events(run / "events.jsonl") if event["event"] == "start"][-1]["pid"]
    while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, "the run outlives the command"
        time.sleep(0.02)


def here(*arguments: object) -> int:
    """Runs `ziggurat ARGUMENTS` in this process, on its eight devices."""
    return main([str(argument) for argument in arguments])


def metrics(run: Path) -> list[dict]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def back_to(step: int, run: Path, folder: Path) -> Path:
    """A copy of a run as it was when its checkpoint of `step` was the newest."""
    shutil.copytree(run, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return folder
