"""Aligned columns of text."""

from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> str:
    """Returns one line a row, with columns two spaces apart.

    Args:
        rows: cells of each row, equally many in all rows.
        right: indices of the columns that are aligned to the right, as numbers are.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in texts
    )
    return "\n".join(line.rstrip() for line in lines)
