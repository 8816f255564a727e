"""Evaluation: every token of every document, against the definition."""

import dataclasses
import math

import jax
import pytest

from tests.data.stand_in import ByteTokenizer
from tests.small import small_model
from train.config import make_config
from train.evaluate import evaluate, gzip_bits_per_byte, make_evaluation_step
from train.mesh import AXES, on_one_device
from train.optimizer import make_optimizer
from train.state import make_state

TEXTS = ["a short one", "é and 漢", "x" * 100, "the last, of several words"]


def evaluation(config, mesh):
    with jax.set_mesh(mesh):
        weights = make_state(config, make_optimizer(config))["weights"]
        return evaluate(make_evaluation_step(config), weights, TEXTS, ByteTokenizer(), config)


def config_for(**data: object):
    config = make_config({"train": {"batch_size": 8}, "data": {"segment_length": 16, **data}})
    return dataclasses.replace(config, model=small_model(num_kv_heads=4))


@pytest.mark.parametrize("mask", [True, False])
def test_figures_are_over_all_tokens_ends_included_and_all_bytes(mask: bool):
    found = evaluation(config_for(mask_documents=mask), on_one_device())
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.bytes, found.documents, found.tokens) == (size, 4, size + 4)
    assert found.loss == pytest.approx(math.log(300), abs=0.7)
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / size)
    assert found.metrics().keys() == {"validation_loss", "validation_bits_per_byte", "validation_tokens"}


def test_a_mesh_and_the_batch_size_change_nothing():
    one = evaluation(config_for(), on_one_device())
    mesh = jax.make_mesh((1, 4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3)
    assert evaluation(config_for(), mesh).loss == pytest.approx(one.loss, rel=1e-6)
    small = dataclasses.replace(config_for(), train=dataclasses.replace(config_for().train, batch_size=2))
    assert evaluation(small, on_one_device()).loss == pytest.approx(one.loss, rel=1e-6)


def test_gzip_compresses_document_by_document():
    text = "the same words again and again, " * 20
    assert gzip_bits_per_byte([text, text]) == gzip_bits_per_byte([text])
    assert 0.3 < gzip_bits_per_byte([text]) < 1.0
