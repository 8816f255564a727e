"""A tokenizer without training: bytes as ids, after two special ones."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.tokenizer.tokenizer import Tokenizer


class ByteTokenizer:
    """Id 257 stands before a document and id 0 after it; a byte b is id b + 1."""

    eos_id, bos_ids = 0, [257]
    stop_ids = (0,)
    vocab_size = 258
    fingerprint = "bytes"
    folder = Path("nowhere")
    encode_with_bos = Tokenizer.encode_with_bos

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1

    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        characters = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return self.encode(text), np.stack([characters, characters + 1], axis=1)


class TextTokenizer(ByteTokenizer):
    """The same, with a text for each id, as samples need it."""

    decode = Tokenizer.decode
    pieces = ("<end>", *map(chr, range(256)), "<begin>")
    special_tokens = ("<end>", "<begin>")

    def token_bytes(self, token: int) -> bytes:
        return b"" if token in (0, 257) else bytes([token - 1])


def tokenize(texts: Iterable[str]) -> Iterator[np.ndarray]:
    return map(ByteTokenizer().encode, texts)
