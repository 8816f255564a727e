"""Chooses the held-out documents that a run keeps and evaluates."""

from collections.abc import Iterable

from data.mixture import Mixture
from train.config.config import Config
from train.run.folder import HeldOutDocument

# Bytes of a usual token; the loop's pieces fill at least a segment.
BYTES_PER_TOKEN = 4


def choose_held_out(mixture: Mixture, size: int) -> list[HeldOutDocument]:
    """Returns the first held-out documents of each corpus, `size` bytes in all in equal shares."""
    share = size // len(mixture.sources)
    return [
        text
        for source in mixture.sources
        for text in take_bytes(
            (
                HeldOutDocument(d.text, d.prompt, source.name, answers=d.answers, rejected=d.rejected)
                for d in source.corpus.held_out()
            ),
            share,
        )
    ]


def loop_documents(held_out: list[HeldOutDocument], config: Config) -> list[HeldOutDocument]:
    """Returns what is evaluated during training: `evaluation.loop_bytes` of the beginnings of many documents.

    Each corpus has an equal share. Where that is less than its documents, they are taken evenly from all of them, in
    pieces of about a segment or more.
    """
    groups = by_corpus(held_out)
    least = BYTES_PER_TOKEN * config.data.segment_length
    taken = []
    for group in groups.values():
        size = config.evaluation.loop_bytes // len(groups)
        count = min(max(size // least, 1), len(group))
        left, pieces = size, list[HeldOutDocument]()
        for i in range(count):
            # What a short document leaves is shared by those after it.
            text = group[i * len(group) // count]
            for piece in take_bytes([text], left // (count - i)):
                pieces.append(piece._replace(cut=text.cut or piece.text != text.text))
                left -= len((piece.prompt + piece.text).encode())
        taken += pieces or take_bytes(group, size)
    return taken


def loop_pairs(held_out: list[HeldOutDocument], config: Config) -> list[HeldOutDocument]:
    """Returns the pairs that are evaluated during training: about `evaluation.loop_bytes`, evenly from all, whole."""
    pairs = [document for document in held_out if document.rejected]
    sizes = [len((d.prompt + d.text + d.rejected.text).encode()) for d in pairs if d.rejected]
    count = min(max(config.evaluation.loop_bytes * len(pairs) // max(sum(sizes), 1), 1), len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def by_corpus(held_out: Iterable[HeldOutDocument]) -> dict[str, list[HeldOutDocument]]:
    """Groups documents by the name of their corpus."""
    groups: dict[str, list[HeldOutDocument]] = {}
    for text in held_out:
        groups.setdefault(text.corpus, []).append(text)
    return groups


def take_bytes(texts: Iterable[HeldOutDocument], size: int) -> list[HeldOutDocument]:
    """Returns the first documents up to `size` bytes with prompts; the last is cut if it is longer."""
    taken: list[HeldOutDocument] = []
    for text in texts:
        encoded = text.text.encode()
        size -= len(text.prompt.encode())
        if len(encoded) >= size:
            cut = text.cut_after(max(size, 0))
            return [*taken, cut] if cut.scored else taken
        taken.append(text)
        size -= len(encoded)
    return taken
