"""The held-out documents of a run."""

from collections.abc import Iterable

from data.mixture import Mixture
from train.run.folder import HeldOutDocument


def choose_held_out(mixture: Mixture, size: int) -> list[HeldOutDocument]:
    """The first held-out documents of each corpus, of `size` bytes in all, shared equally."""
    share = size // len(mixture.sources)
    return [
        text
        for name, documents in mixture.held_out()
        for text in take_bytes((HeldOutDocument(document.text, document.prompt, name) for document in documents), share)
    ]


def first_of_each_corpus(held_out: list[HeldOutDocument], size: int) -> list[HeldOutDocument]:
    """The first of these documents, of `size` bytes in all, shared equally by their corpora."""
    names = dict.fromkeys(text.corpus for text in held_out)
    return [
        text
        for name in names
        for text in take_bytes((text for text in held_out if text.corpus == name), size // len(names))
    ]


def take_bytes(texts: Iterable[HeldOutDocument], size: int) -> list[HeldOutDocument]:
    """The first texts, of `size` bytes in all, prompts included; the last is cut where it is longer."""
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
