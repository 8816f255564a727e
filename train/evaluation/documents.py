"""Chooses the held-out documents that a run keeps and evaluates."""

from collections.abc import Iterable

from data.mixture import Mixture
from train.run.folder import HeldOutDocument


def choose_held_out(mixture: Mixture, size: int) -> list[HeldOutDocument]:
    """Returns the first held-out documents of each corpus, `size` bytes in all in equal shares."""
    share = size // len(mixture.sources)
    return [
        text
        for source in mixture.sources
        for text in take_bytes(
            (HeldOutDocument(d.text, d.prompt, source.name) for d in source.corpus.held_out()), share
        )
    ]


def first_of_each_corpus(held_out: list[HeldOutDocument], size: int) -> list[HeldOutDocument]:
    """Returns the first of some documents, `size` bytes in all in equal shares for each corpus."""
    groups = by_corpus(held_out)
    return [text for group in groups.values() for text in take_bytes(group, size // len(groups))]


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
            cut = encoded[: max(size, 0)].decode(errors="ignore")
            return [*taken, text._replace(text=cut)] if cut else taken
        taken.append(text)
        size -= len(encoded)
    return taken
