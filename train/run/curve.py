"""The curve of a run for a terminal: its loss over all its steps, in braille dots, and what it is compared with."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.text import Text

# The most points that are kept; each is the mean loss of consecutive steps.
POINTS = 1024
# Columns left of the curve, for the ends of its scale.
LEFT = 6
# Unicode's braille patterns: the first, and what each dot of a cell adds to it, row by row.
BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
LEVEL, MARK = "┄", "●"
STYLES = {" ": "", LEVEL: "dim", MARK: "bold yellow"}


class Curve:
    """The loss of a run's training rows and of its held-out text.

    The scale is in bits a byte of the held-out text, once it is known: the loss of training rows, in nats a token, is
    shown at the bits a byte that the held-out text has at the same loss.

    Attributes:
        levels: bits a byte of the same text by what it is compared with, such as gzip.
    """

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._sums = np.zeros(min(num_steps, POINTS))
        self._counts = np.zeros(len(self._sums))
        self._held_out: dict[int, float] = {}  # loss by step
        self._bits = 0.0  # of a byte for each nat of a token
        self.levels: dict[str, float] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds the figures of a step: `loss`, or those of its evaluation, or both."""
        step, loss = record["step"], record.get("loss")
        if loss is not None and math.isfinite(loss) and 0 < step <= self._num_steps:
            point = (step - 1) * len(self._sums) // self._num_steps
            self._sums[point] += loss
            self._counts[point] += 1
        loss, bits = record.get("validation_loss"), record.get("validation_bits_per_byte")
        if loss and bits and math.isfinite(loss):
            self._bits = bits / loss
            self._held_out[step] = loss

    def draw(self, width: int, height: int, step: int) -> list[Text]:
        """Returns at most `height` lines of `width` columns: a title, the curve, and below it how far the run is.

        The columns of the curve stand for all steps of the run. Right of it are the levels and the newest evaluation.
        """
        scale = self._bits or 1.0
        held_out = [(step, loss * scale) for step, loss in sorted(self._held_out.items())]
        levels = dict(self.levels) if held_out else {}
        labels = levels | ({"held out": held_out[-1][1]} if held_out else {})
        right = max((len(f" {name} {bits:.3f}") for name, bits in labels.items()), default=len(" 100%"))
        columns, rows = width - LEFT - right, height - 2
        done = step / self._num_steps
        progress = Text(f"{' ' * LEFT}{bar(done, columns)} {done:.0%}")
        x, y = self._points(2 * columns)
        if not len(x):
            return [progress]
        shown = [*(y * scale), *levels.values(), *(bits for _, bits in held_out)]
        low, high = min(shown), max(shown)

        def row(bits: float, rows: int = rows) -> int:
            return round((high - bits) / max(high - low, 1e-9) * (rows - 1))

        cells = np.full((rows, columns), " ")
        for bits in levels.values():
            cells[row(bits)] = LEVEL
        draw_line(cells, x, [row(loss * scale, 4 * rows) for loss in y])
        for at, bits in held_out:
            cells[row(bits), (at - 1) * columns // self._num_steps] = MARK
        title = f"bits a byte:  ⠒ training  {MARK} held-out text" if held_out else "loss of the training rows"
        places = label_rows({name: row(bits) for name, bits in labels.items()}, labels, rows)
        ends = {0: f"{high:.2f}", rows - 1: f"{low:.2f}"}
        lines = [Text(title, "dim")]
        for i, line in enumerate(cells):
            text = Text(ends.get(i, "")[: LEFT - 1].rjust(LEFT - 1) + " ")
            for char, same in itertools.groupby(line):
                text.append("".join(same), STYLES.get(str(char), "cyan"))
            if name := places.get(i):
                text.append(f" {name} {labels[name]:.3f}", "dim" if name in levels else "bold")
            lines.append(text)
        return [*lines, progress]

    def _points(self, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the columns of the curve, without a gap, and the mean loss in each."""
        (known,) = np.nonzero(self._counts)
        at = (known * columns) // len(self._sums)
        sums, counts = (np.bincount(at, x[known], minlength=columns) for x in (self._sums, self._counts))
        (filled,) = np.nonzero(counts)
        if not len(filled):
            return filled, filled
        x = np.arange(filled[0], filled[-1] + 1)
        return x, np.interp(x, filled, sums[filled] / counts[filled])


def bar(done: float, columns: int) -> str:
    """Returns a bar of a number of columns, filled by a share from 0 to 1."""
    filled = int(columns * done)
    return "█" * filled + "·" * (columns - filled)


def draw_line(cells: np.ndarray, columns: np.ndarray, rows: Sequence[int]) -> None:
    """Draws a line into characters [R, C] from its dots, given in neighbouring columns of 2C and rows of 4R."""
    R, C = cells.shape
    dots = np.zeros((4 * R, 2 * C), bool)
    for x, before, y in zip(columns, [rows[0], *rows], rows, strict=False):
        dots[min(before, y) : max(before, y) + 1, x] = True
    codes = (dots.reshape(R, 4, C, 2) * np.array(DOTS)[:, None]).sum(axis=(1, 3))
    for i, j in zip(*np.nonzero(codes), strict=True):
        cells[i, j] = chr(BRAILLE + codes[i, j])


def label_rows(wanted: Mapping[str, int], values: Mapping[str, float], rows: int) -> dict[int, str]:
    """Returns the name of the label in each row: near the row that it wants, in the order of their values."""
    places: dict[int, str] = {}
    free = rows
    for name in sorted(values, key=lambda name: values[name]):
        free = min(wanted[name], free - 1)
        places[max(free, 0)] = name
    return places
