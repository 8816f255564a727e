"""What surrounds the evaluations of a run: their programs, and the figures that they are compared with."""

import gzip
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from data.tokenizer.folder import load_tokenizer
from train.data_identity import RunInputs
from train.devices.mesh import one_device_mesh
from train.display import Display
from train.evaluation.documents import loop_documents
from train.evaluations import Evaluations
from train.loop import Training
from train.prepare import open_run_mixture
from train.run.curve import BRAILLE, LEFT
from train.run.folder import Run
from train.step.compile_ahead import CompileAhead
from train.weights.load import load_trained

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def evaluations(finished: Path) -> Evaluations:
    run = Run(finished)
    config, tokenizer, held_out = run.load_config(), load_tokenizer(run.tokenizer), run.held_out_texts()
    with jax.set_mesh(one_device_mesh()):
        evaluations = Evaluations(RunInputs(config, open_run_mixture(config, run), tokenizer, held_out, {}))
    evaluations.use(held_out)
    return evaluations


def test_evaluations_that_were_compiled_ahead_compile_nothing(finished: Path, evaluations: Evaluations):
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if event == COMPILED else None
    )
    jax.clear_caches()
    with jax.set_mesh(one_device_mesh()):
        weights = load_trained(str(finished)).weights
        compiled.clear()
        ahead = CompileAhead(one_device_mesh())
        ahead.begin(evaluations.compile)
        ahead.wait()
        assert compiled
        compiled.clear()
        fields = evaluations.run(1, 12, weights)
    assert fields["sample"]
    assert not compiled


def test_the_curve_begins_with_the_steps_before_and_what_the_run_is_compared_with(
    finished: Path, evaluations: Evaluations
):
    run, display = Run(finished), Display(12, 10, quiet=False)
    Training.draw_past(SimpleNamespace(run=run, evaluations=evaluations, display=display), 8)  # type: ignore[arg-type]
    text = "".join(text.text for text in loop_documents(run.held_out_texts(), run.load_config())).encode()
    assert display.curve.levels.keys() == {"gzip -9", "5-gram"}
    assert display.curve.levels["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert 0 < display.curve.levels["5-gram"] < 8
    display.curve.levels = {}
    _, *lines, progress = display.curve.draw(80, 20, 8)
    columns = progress.plain.count("█") + progress.plain.count("·")
    dots = [i - LEFT for line in lines for i, char in enumerate(line.plain) if char > chr(BRAILLE)]
    # Step 8 is the last that is drawn, from the seventh twelfth on.
    assert (min(dots), max(dots)) == (0, 7 * columns // 12)
