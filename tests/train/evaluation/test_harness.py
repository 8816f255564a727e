"""Our model as lm-evaluation-harness asks it, against logits and against the harness's own windows."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np

from model.decoder import Decoder
from tests.data.stand_in import ByteTokenizer
from tests.peers import require
from tests.small import mesh_of, small_model
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.devices.rules import TRAINING
from train.step.optimizer import make_optimizer
from train.step.state import make_state

T = 32
CONFIG = dataclasses.replace(
    make_config({"train": {"batch_size": 8}, "data": {"segment_length": T}}), model=small_model(num_kv_heads=4)
)


class Letters(ByteTokenizer):
    """Every byte is a character."""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32) + 1

    def token_bytes(self, token: int) -> bytes:
        return chr(token - 1).encode() if token else b""


def adapter():
    """To initial weights, on the ambient mesh."""
    require("lm_eval")
    from train.evaluation.harness import HarnessModel

    model = HarnessModel(CONFIG, Letters(), lambda: None)
    model.weights = make_state(CONFIG, make_optimizer(CONFIG))["weights"]
    return model


def log_probabilities(weights, tokens: list[int]) -> np.ndarray:
    """Of what follows each of these tokens, [n, V], from a plain pass."""
    row = np.zeros((1, T), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(plain_pass(weights, row))[: len(tokens)]


@jax.jit
def plain_pass(weights, tokens_BT: jax.Array) -> jax.Array:
    decoder = Decoder(CONFIG.model, weights, TRAINING)
    return jax.nn.log_softmax(decoder.logits(decoder(tokens_BT, jnp.arange(T)[None], jnp.ones_like(tokens_BT))))[0]


def test_scores_are_those_of_the_logits_on_every_mesh():
    random_tokens = np.random.default_rng(0).integers(1, 257, 200).tolist()
    pairs = [(random_tokens[i : i + 1 + i % 15], random_tokens[-1 - i % 9 :]) for i in range(24)]
    # More than a segment, of which the newest T and one are read; and a continuation that is longer than one.
    pairs += [(random_tokens[:40], random_tokens[60:65]), (random_tokens[:3], random_tokens[100:170])]
    with jax.set_mesh(one_device_mesh()):
        weights = adapter().weights
        greedy = random_tokens[:5]
        for _ in range(4):
            greedy = [*greedy, int(log_probabilities(weights, greedy)[-1].argmax())]
        pairs += [(greedy[:5], greedy[5:]), (greedy[:5], [*greedy[5:-1], greedy[-1] + 1])]
        expected = []
        for context, continuation in pairs:
            score = 0.0
            for at in range(0, len(continuation), T):
                part = continuation[at : at + T]
                seen = (context + continuation[:at] + part)[-T - 1 :]
                log_p = log_probabilities(weights, seen[:-1])[-len(part) :]
                score += float(log_p[np.arange(len(part)), part].sum())
            expected.append(score)
        found = [adapter().scores(pairs)]
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        model = adapter()
        step, answers = model._step, []
        model._step = lambda *of: answers.append(step(*of)) or answers[-1]
        found.append(model.scores(pairs))
        # On several processes each must have all of them.
        assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(answers))
    for of_mesh in found:
        assert np.abs(np.array([score for score, _ in of_mesh]) - expected).max() <= 2e-4
        assert [is_greedy for _, is_greedy in of_mesh[-3:]] == [False, True, False]


def test_a_continuation_ends_before_its_first_stop_string():
    with jax.set_mesh(one_device_mesh()):
        model = adapter()
        whole = model.continued(["some words"], {"until": [], "max_gen_toks": 12})[0]
        assert 0 < len(whole) <= 12
        stops = [whole[7:], whole[3:5], ""]
        assert model.continued(["some words"], {"until": stops})[0] == whole[: whole.find(whole[3:5])]
        # Also what is no list; and a prompt that the model cannot see at once with what is to come.
        assert model.continued(["some words"], {"until": whole[0]})[0] == ""
        whole, newest = model.continued(["some words" * 9, ("some words" * 9)[-(T - 4) :]], {"max_gen_toks": 4})
        assert whole == newest
        assert len(model.continued(["x" * 99], {"max_gen_toks": 50})[0]) <= 50


def test_what_stands_before_a_text_is_never_scored():
    with jax.set_mesh(one_device_mesh()):
        model = adapter()
        before = model.tokenizer.bos_ids
        assert model.pair("", "") == (before, [])
        assert model.pair("", "a") == (before, model.tokenizer.encode("a").tolist())
        assert model.pair(" ", "a") == (before, model.tokenizer.encode(" a").tolist())
        assert model.scores([model.pair("", "")]) == [(0.0, True)]


def test_a_whole_text_is_read_in_the_harnesss_own_disjoint_windows():
    require("lm_eval")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from train.evaluation.harness import scoring_windows

    for n in range(30):
        tokens = list(range(1, n + 1))
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 0, 7, 1)]
        ours = [(piece[:-count], piece[-count:]) for piece, count in scoring_windows([0], tokens, 7)]
        assert ours == theirs


def test_rows_are_as_short_as_they_can_be_and_the_mesh_can_share():
    require("lm_eval")
    from train.evaluation.harness import row_lengths

    def lengths(segment_length: int, **axes: int) -> list[int]:
        with jax.set_mesh(mesh_of(**axes)):
            data = dataclasses.replace(CONFIG.data, segment_length=segment_length)
            return row_lengths(dataclasses.replace(CONFIG, data=data))

    assert lengths(256) == [16, 32, 64, 128, 256]
    assert lengths(48, context=2) == [24, 48]
    assert lengths(40, context=4, tensor=2) == [40]


def test_the_harness_is_kept_quiet_and_leaves_the_random_numbers_alone(capsys):
    require("lm_eval")
    from train.evaluation.harness import silence_harness

    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist()
    drawn = []
    for _ in range(2):
        with silence_harness():
            print("words")
            drawn.append((random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert capsys.readouterr().out == ""
