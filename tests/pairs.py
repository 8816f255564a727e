"""Batches of pairs of answers, as the segmenter packs them."""

import numpy as np

from data.config import DataConfig
from data.segmenter import DocumentPairs, make_pairs, make_segment, pack
from tests.small import VOCAB_SIZE

BOS, EOS = 1, 2
Batch = dict[str, np.ndarray]


def random_pairs(count: int, seed: int = 0, longest: int = 5) -> list[DocumentPairs]:
    """Pairs whose prompts and answers have from 1 to `longest` tokens."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt, *answers = (random.integers(3, VOCAB_SIZE, random.integers(1, longest + 1)) for _ in range(3))
        chosen, rejected = (
            make_pairs(np.concatenate([prompt, answer]), [BOS], EOS, prompt_length=len(prompt)) for answer in answers
        )
        pairs.append(chosen._replace(rejected=rejected))
    return pairs


def batch_of(pairs: list[DocumentPairs], rows: int, length: int = 32) -> Batch:
    """The pairs in rows; the last rows may be empty."""
    config = DataConfig(segment_length=length, segmentation="pack")
    made = [make_segment(parts, config) for parts in pack(pairs, config)]
    assert len(made) <= rows
    made += [make_segment([], config)] * (rows - len(made))
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def pair_batch(rows: int = 8, length: int = 32, seed: int = 0) -> Batch:
    """About one and a half pairs a row."""
    return batch_of(random_pairs(rows + rows // 2, seed), rows, length)
