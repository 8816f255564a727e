"""Aligned columns of text."""

from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> str:
    """Returns one line a row, with columns two spaces apart; those of the indices `right` are aligned to the right."""
    aligned = []
    for i, column in enumerate(zip(*rows, strict=True)):
        texts = [str(cell) for cell in column]
        width = max(map(len, texts))
        aligned.append([text.rjust(width) if i in right else text.ljust(width) for text in texts])
    return "\n".join("  ".join(row).rstrip() for row in zip(*aligned, strict=True))
