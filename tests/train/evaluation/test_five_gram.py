"""The 5-gram model of bytes that a run is compared with."""

import math
import random

import numpy as np
import pytest

from train.evaluation.five_gram import KneserNey, five_gram_bits_per_byte, grams
from train.run.folder import HeldOutDocument

TEXTS = [HeldOutDocument(text) for text in ("the cat sat on the mat", "the dog sat on the log", "é漢")]


@pytest.mark.parametrize("before", [b"the ", b"t on", b"xyz ", b"\0\0\0t", b"zzzz"])
def test_the_probabilities_of_all_next_bytes_sum_to_one(before: bytes):
    context = int.from_bytes(before, "big") << 8
    probabilities = KneserNey(grams(TEXTS))(context + np.arange(256))
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1)


def test_the_end_of_a_document_is_predicted_and_its_prompt_is_not():
    gram = int.from_bytes(b"mat\0", "big")
    assert grams([HeldOutDocument("mat", prompt="a question")])[-1] == gram
    assert len(grams(TEXTS)) == sum(len(text.text.encode()) + 1 for text in TEXTS)


def test_text_like_that_which_was_counted_takes_fewer_bits():
    chance = random.Random(0)
    noise = HeldOutDocument("".join(chance.choices("abcdefghijklmnop", k=2000)))
    assert five_gram_bits_per_byte([noise], [noise._replace(text=noise.text[::-1])]) > math.log2(16)
    words = HeldOutDocument("the cat sat on the mat. " * 100)
    assert five_gram_bits_per_byte([words], [words]) < 0.1
