"""Evaluation: every token of every document, against the definition."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decoder import Decoder
from tests.data.stand_in import ByteTokenizer
from tests.small import mesh_of, small_model
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.devices.rules import TRAINING
from train.evaluation.held_out import evaluate, gzip_bits_per_byte, make_evaluation_step
from train.evaluation.results import combine, evaluation_metrics
from train.run.folder import HeldOutDocument
from train.step.optimizer import make_optimizer
from train.step.state import make_state

TEXTS = [HeldOutDocument(text) for text in ("a short one", "é and 漢", "x" * 100, "the last, of several words")]


def evaluations(config, mesh, texts=TEXTS):
    with jax.set_mesh(mesh):
        weights = make_state(config, make_optimizer(config))["weights"]
        return evaluate(make_evaluation_step(config), weights, texts, ByteTokenizer(), config)


def evaluation(config, mesh, texts=TEXTS):
    [(name, found)] = evaluations(config, mesh, texts).items()
    assert name == ""
    return found


def config_for(**data: object):
    config = make_config({"train": {"batch_size": 8}, "data": {"segment_length": 16, **data}})
    return dataclasses.replace(config, model=small_model(num_kv_heads=4))


@pytest.mark.parametrize("mask", [True, False])
def test_figures_are_over_all_tokens_ends_included_and_all_bytes(mask: bool):
    found = evaluation(config_for(document_mask=mask), one_device_mesh())
    size = sum(len(text.text.encode()) for text in TEXTS)
    assert (found.bytes, found.documents, found.tokens) == (size, 4, size + 4)
    assert found.loss == pytest.approx(math.log(300), abs=0.7)
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / size)
    metrics = evaluation_metrics({"": found})
    names = {"validation_loss", "validation_bits_per_byte", "validation_accuracy", "validation_tokens"}
    assert metrics.keys() == names


def test_the_loss_is_that_of_each_token_and_the_end():
    config, tokenizer = config_for(), ByteTokenizer()
    text = "é漢 abc"
    tokens = [*tokenizer.bos_ids, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
    found = evaluation(config, one_device_mesh(), [HeldOutDocument(text)])
    with jax.set_mesh(one_device_mesh()):
        decoder = Decoder(config.model, make_state(config, make_optimizer(config))["weights"], TRAINING)
        inputs = jnp.array([tokens[:-1]])
        x_BTD = decoder(inputs, jnp.arange(inputs.shape[1])[None], jnp.ones_like(inputs))
        log_p = np.asarray(jax.nn.log_softmax(decoder.logits(x_BTD)))[0]
    expected = -sum(log_p[range(len(tokens) - 1), tokens[1:]])
    assert found.loss * found.tokens == pytest.approx(expected, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)


def test_the_accuracy_is_the_share_of_tokens_that_the_model_finds_most_likely():
    config = config_for(segment_length=64)
    several = [HeldOutDocument("an answer", prompt="a question? ", corpus="a"), HeldOutDocument("x" * 29, corpus="b")]
    with jax.set_mesh(one_device_mesh()):
        # Without weights all tokens are equally likely. The first of them counts, which is the end of a document.
        weights = jax.tree.map(jnp.zeros_like, make_state(config, make_optimizer(config))["weights"])
        found = evaluate(make_evaluation_step(config), weights, several, ByteTokenizer(), config)
    assert {name: of.accuracy for name, of in found.items()} == pytest.approx({"a": 1 / 10, "b": 1 / 30})
    assert combine(found.values()).accuracy == pytest.approx(2 / 40)
    assert evaluation_metrics(found)["validation_accuracy"] == pytest.approx(2 / 40)


def test_several_corpora_have_figures_of_their_own_and_in_all():
    config, mesh = config_for(), one_device_mesh()
    several = [text._replace(corpus="a" if i % 2 else "b") for i, text in enumerate(TEXTS)]
    found = evaluations(config, mesh, several)
    assert list(found) == ["b", "a"]
    for name in found:
        alone = evaluation(config, mesh, [text._replace(corpus="") for text in several if text.corpus == name])
        assert dataclasses.astuple(found[name]) == pytest.approx(dataclasses.astuple(alone), rel=1e-6)
    whole = combine(found.values())
    assert (whole.documents, whole.tokens) == (4, sum(len(text.text.encode()) + 1 for text in TEXTS))
    nats = sum(result.loss * result.tokens for result in found.values())
    assert whole.loss == pytest.approx(nats / whole.tokens)
    metrics = evaluation_metrics(found)
    assert metrics["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / whole.bytes)
    assert metrics["validation_by_corpus"]["a"]["validation_loss"] == found["a"].loss


def test_a_prompt_is_seen_and_not_counted():
    config, mesh = config_for(segment_length=64), one_device_mesh()
    found = evaluation(config, mesh, [HeldOutDocument("an answer", prompt="a question? ")])
    assert (found.tokens, found.bytes) == (len("an answer") + 1, len("an answer"))
    whole, prompt = (
        evaluation(config, mesh, [HeldOutDocument(text)]) for text in ("a question? an answer", "a question? ")
    )
    assert found.loss != pytest.approx(evaluation(config, mesh, [HeldOutDocument("an answer")]).loss, rel=1e-4)
    # All positions but the prompt's; its own end is not one of the whole text.
    assert whole.loss * whole.tokens - found.loss * found.tokens == pytest.approx(prompt.loss * prompt.tokens, rel=0.15)


def test_a_mesh_and_the_batch_size_change_nothing():
    one = evaluation(config_for(), one_device_mesh())
    mesh = mesh_of(fsdp=4, tensor=2)
    assert evaluation(config_for(), mesh).loss == pytest.approx(one.loss, rel=1e-6)
    small = dataclasses.replace(config_for(), train=dataclasses.replace(config_for().train, batch_size=2))
    assert evaluation(small, one_device_mesh()).loss == pytest.approx(one.loss, rel=1e-6)


def test_gzip_compresses_document_by_document():
    text = HeldOutDocument("the same words again and again, " * 20)
    assert gzip_bits_per_byte([text, text]) == gzip_bits_per_byte([text])
    assert 0.3 < gzip_bits_per_byte([text]) < 1.0
