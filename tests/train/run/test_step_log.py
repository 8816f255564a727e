"""What a run says of itself: each step once, honest rates, stated FLOPs, and a display for terminals and logs."""

import io
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

from model.decoder import Decoder
from tests.small import small_batch, small_model, small_weights
from train.display import Display, Rate
from train.run.goodput import duration
from train.run.step_log import StepLog, read_step_log
from train.step.flops import flops_per_token, memory_bytes, peak_flops


def steps(path: Path) -> list[int]:
    return [record["step"] for _, record in read_step_log(path)]


def test_after_a_restart_each_step_stands_once_and_a_torn_line_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 8)) + '{"step": 8, "lo')
    file = StepLog(path, step=4)
    assert steps(path) == [1, 2, 3, 4]
    file.write({"step": 5, "loss": 0.5})
    assert steps(path) == [1, 2, 3, 4, 5]
    file.close()
    assert path.read_text().count("\n") == 5


def test_memory_is_what_this_process_has_had_at_most():
    before = memory_bytes()
    held = bytearray(2**27)
    assert 2**25 < before <= memory_bytes()
    assert memory_bytes() >= len(held)


def test_the_rate_is_of_finished_steps_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.display.time.perf_counter", lambda: now[0])
    rate = Rate(window=3)
    rate.start()
    for seconds in (1.0, 2.0, 2.0, 2.0):
        now[0] += seconds
        rate.finished(1000)
    assert rate.tokens_per_second == pytest.approx(500)
    assert rate.seconds(3000) == pytest.approx(6)
    now[0] += 50
    rate.start()
    now[0] += 1
    rate.finished(1000)
    assert rate.tokens_per_second == pytest.approx(1000)


@pytest.mark.parametrize("tie", [True, False])
def test_the_flops_formula_is_that_of_the_products_in_the_forward_pass_times_three(tie: bool):
    config = small_model(tie_embeddings=tie, model_dim=128, feedforward_dim=512, vocab_size=1024)
    batch = small_batch(4, 128)

    def logits(weights, tokens, positions, segment_ids):
        decoder = Decoder(config, weights)
        return decoder.logits(decoder(tokens, positions, segment_ids))

    arguments = (batch["tokens"], batch["positions"], batch["segment_ids"])
    lowered = jax.jit(logits).lower(small_weights(config), *arguments)
    compiled = lowered.compile().cost_analysis()["flops"]
    # The compiler counts the body of the layer loop once, and attention without causality.
    one_layer = small_model(num_layers=1, tie_embeddings=tie, model_dim=128, feedforward_dim=512, vocab_size=1024)
    attention = 12 * 4 * 32 * 128 / 2
    expected = (flops_per_token(one_layer, 128) + attention) / 3 * 4 * 128
    assert compiled == pytest.approx(expected, rel=0.1)


def test_the_peak_of_a_cpu_is_measured_and_says_so():
    flops, source = peak_flops("float32")
    assert flops > 1e9
    assert "measured here" in source


RECORD = {"step": 10, "loss": 2.5, "tokens_per_second": 1234.5, "peak_share": 0.5, "data_wait_seconds": 0.25}


def shown(terminal: bool, quiet: bool = False, every: int = 10) -> str:
    out = io.StringIO()
    display = Display(40, every, quiet)
    display._console = Console(file=out, force_terminal=terminal, width=160)
    for step in range(1, 12):
        display.step(RECORD | {"step": step}, 90.0)
    display.evaluation(RECORD | {"validation_bits_per_byte": 1.5, "validation_loss": 3.0, "sample": "def f():\n  pass"})
    display.close()
    return out.getvalue()


def test_a_log_has_plain_lines_every_few_steps():
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("step 1/40")
    assert lines[1] == "step 10/40  loss 2.5000  1,234 tokens/s  50% of peak  data wait 0.25 s  ETA 1 min 30 s"
    assert lines[2] == "step 10  held-out: 1.500 bits a byte, loss 3.0000; sample:"
    assert lines[3:] == ["    def f():", "      pass"]


def test_a_terminal_has_a_live_line_and_other_processes_show_nothing():
    assert "█" in shown(terminal=True)
    assert shown(terminal=False, quiet=True) == ""


def test_durations_are_written_as_people_do():
    assert [duration(s) for s in (4.4, 75, 3600 * 5 + 120)] == ["4 s", "1 min 15 s", "5 h 2 min"]
