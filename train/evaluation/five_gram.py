"""A model of bytes that counts: the least that a language model must be better than.

Interpolated Kneser-Ney smoothing with one discount for each order (Kneser and Ney 1995; Chen and Goodman 1999). Each
document begins after zeros and ends with one.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from train.run.folder import HeldOutDocument

ORDER = 5


def five_gram_bits_per_byte(counted: Iterable[HeldOutDocument], texts: Sequence[HeldOutDocument]) -> float:
    """Returns the bits per byte of documents, ends included, by a 5-gram model of bytes that has counted others."""
    probabilities = KneserNey(grams(counted))(grams(texts))
    return float(-np.log2(probabilities).sum() / sum(len(text.scored.encode()) for text in texts))


def grams(texts: Iterable[HeldOutDocument]) -> np.ndarray:
    """Returns every byte with the four before it, and every end, as a number of 40 bits, int64 [n]."""
    parts = []
    for text in texts:
        stream = np.concatenate([np.zeros(ORDER - 1, np.int64), np.frombuffer(text.scored.encode(), np.uint8), [0]])
        count = len(stream) - ORDER + 1
        parts.append(sum(stream[i : i + count] << (8 * (ORDER - 1 - i)) for i in range(ORDER)))
    return np.concatenate(parts)


class KneserNey:
    """Probabilities of bytes after up to four others, from the `grams` of training texts."""

    def __init__(self, training: np.ndarray):
        self._orders = []
        seen, counts = np.unique(training, return_counts=True)
        for order in range(ORDER, 0, -1):
            once, twice = np.sum(counts == 1), np.sum(counts == 2)
            discount = once / (once + 2 * twice) if once else 0.5
            contexts, inverse = np.unique(seen >> 8, return_inverse=True)
            totals, kinds = np.bincount(inverse, counts), np.bincount(inverse)
            self._orders.append((order, discount, seen, counts, contexts, totals, kinds))
            # A shorter gram counts the different bytes that came before it.
            seen, counts = np.unique(seen & (256 ** (order - 1) - 1), return_counts=True)

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the probability of each gram's last byte after its others, float64 [n]."""
        probability = np.full(len(wanted), 1 / 256)
        for order, discount, seen, counts, contexts, totals, kinds in reversed(self._orders):
            gram = wanted & (256**order - 1)
            count = look_up(seen, counts, gram)
            total, kind = look_up(contexts, totals, gram >> 8), look_up(contexts, kinds, gram >> 8)
            known = np.maximum(total, 1)
            mixed = np.maximum(count - discount, 0) / known + discount * kind / known * probability
            probability = np.where(total > 0, mixed, probability)
        return probability


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the values of sorted keys; 0 where a key is not among them."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
