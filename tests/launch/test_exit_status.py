"""Errors of a distributed run: a lost peer is one line, everything else keeps its traceback."""

import jax
import pytest

from data.errors import Fault
from launch.exit_status import report_error
from launch.pretrain import lost_peer

XlaError = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (XlaError("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:34567\nmore"), True),
        (XlaError("NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error."), True),
        (XlaError("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task died"), True),
        (XlaError("NCCL operation ncclAllReduce() failed: invalid argument"), False),
        (ValueError("the flag NCCL_DEBUG of the coordination service"), False),
    ],
)
def test_only_xlas_errors_about_a_peer_are_a_lost_peer(error: Exception, is_lost: bool):
    outer = RuntimeError("cannot save")
    outer.__cause__ = error
    expected = str(error).splitlines()[0] if is_lost else ""
    assert lost_peer(error) == lost_peer(outer) == expected


def test_a_fault_is_one_line_and_an_unknown_error_a_traceback(capsys):
    assert report_error(Fault("a peer is lost")) == 1
    assert capsys.readouterr().err == "ziggurat: a peer is lost\n"
    assert report_error(ValueError("a bug")) == 1
    assert "ValueError: a bug" in capsys.readouterr().err
