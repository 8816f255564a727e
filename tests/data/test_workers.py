"""Tokenizing in other processes: the same tokens in the same order, and no process is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import Tokenizer, train_tokenizer
from data.workers import Workers
from tests.data.texts import NASTY, code


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code()[:10], 1000, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("number", [1, 3])
def test_workers_give_the_same_tokens_in_order(tokenizer: Tokenizer, number: int):
    texts = [*NASTY, *code()[:10], *NASTY]
    workers = Workers(tokenizer.folder, number)
    found = list(workers(iter(texts)))
    workers.close()
    assert len(found) == len(texts)
    for tokens, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def test_ctrl_c_is_left_to_the_parent(tokenizer: Tokenizer):
    workers = Workers(tokenizer.folder, 1)
    list(workers(["it has begun"]))
    [process] = workers._processes
    process.send_signal(signal.SIGINT)
    [found] = workers(["it goes on"])
    workers.close()
    np.testing.assert_array_equal(found, tokenizer.encode("it goes on"))
    assert process.returncode == 0


def test_they_end_with_their_parent(tokenizer: Tokenizer, tmp_path: Path):
    program = (
        "import sys, time; from pathlib import Path; from data.workers import Workers\n"
        f"workers = Workers(Path({str(tokenizer.folder)!r}), 2)\n"
        "list(workers(['a', 'b', 'c', 'd']))\n"
        "print(*[process.pid for process in workers._processes], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/cmdline") and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
