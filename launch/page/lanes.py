"""A chart of what happens at the same time: blocks in lanes on one axis of time."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from launch.page.markup import Html, element

# Neighbours that are both narrower than this share of the chart are drawn as one block.
LEAST_WIDTH = 1 / 2000


class Block(NamedTuple):
    """Something that happens from one time to another."""

    lane: str  # name of its lane
    kind: str  # class of its looks
    title: str  # text under the pointer
    start: float
    end: float
    label: str = ""  # text inside


def lanes_chart(blocks: Sequence[Block], end: float, ticks: Sequence[tuple[float, str]], description: str) -> Html:
    """Returns the chart of blocks from time 0 to `end`, with lanes in the order in which the blocks name them.

    `ticks` are the times that the axis names.
    """
    lanes: dict[str, list[Block]] = {}
    for block in blocks:
        lanes.setdefault(block.lane, []).append(block)

    def place(block: Block) -> str:
        return f"left:{100 * block.start / end:.3f}%;width:{100 * (block.end - block.start) / end:.3f}%"

    rows = []
    for name, of_lane in lanes.items():
        drawn = (
            element("i", block.label or None, class_=block.kind, style=place(block), title=block.title)
            for block in merged(of_lane, end * LEAST_WIDTH)
        )
        rows += [element("span", name), element("div", *drawn)]
    labels = (element("small", text, style=f"left:{100 * at / end:.2f}%") for at, text in ticks)
    rows += [element("span", ""), element("div", *labels, class_="axis")]
    return element("div", *rows, class_="lanes", role="img", aria_label=description)


def merged(blocks: Iterable[Block], width: float) -> list[Block]:
    """Returns the blocks of a lane by time, with runs of neighbours narrower than `width` as one block each."""
    kept: list[Block] = []
    run = 0  # number of blocks in the last one
    for block in sorted(blocks, key=lambda block: block.start):
        last = kept[-1] if kept else None
        is_small = block.end - block.start < width
        if last and is_small and run and block.kind == last.kind and block.start - last.end < width:
            run += 1
            kept[-1] = last._replace(end=max(block.end, last.end), title=f"{run} short operations", label="")
        else:
            run = int(is_small)
            kept.append(block)
    return kept
