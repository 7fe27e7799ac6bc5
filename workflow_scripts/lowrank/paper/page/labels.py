"""Where the labels of a drawing's marks stand: beside their marks, inside the axes, and not on one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHARACTER, LINE = 5.5, 9.5  # of the drawing's units, of the font that labels have
MARK = 5.0  # from the middle of a mark to its edge
DISTANCE = 8.0  # from the middle of a mark to its label
BASELINE = 3.0  # below the middle of a line


@dataclass(frozen=True)
class Box:
    """A rectangle of the drawing, whose y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        """Width by height."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Label:
    """A text; `x` and `y` are from the middle of its mark to the end where it is anchored, on its baseline."""

    text: str
    x: float
    y: float
    anchor: str
    box: Box


def mark_box(x: float, y: float) -> Box:
    """What a mark covers."""
    return Box(x - MARK, y - MARK, x + MARK, y + MARK)


def place_labels(marks: Sequence[tuple[float, float, str]], taken: Sequence[Box], inside: Box) -> list[Label | None]:
    """A label for each mark that has a text, where it covers least of marks, labels and what lies outside.

    Args:
        marks: place and text of each.
        taken: what labels shall not cover, besides the marks.
        inside: the axes.
    """
    obstacles = [*taken, *(mark_box(x, y) for x, y, _ in marks)]
    placed: list[Label | None] = []
    for x, y, text in marks:
        if not text:
            placed.append(None)
            continue
        label = min(_candidates(x, y, text), key=lambda each: _covered(each.box, obstacles, inside))
        obstacles.append(label.box)
        placed.append(label)
    return placed


def _candidates(x: float, y: float, text: str) -> Iterator[Label]:
    """Right of the mark, else left, else above or below of these."""
    width = CHARACTER * len(text)
    for rise in (0.0, -LINE, LINE):
        for side, anchor in ((1, "start"), (-1, "end")):
            start, middle = x + side * DISTANCE, y + rise
            left, right = sorted((start, start + side * width))
            box = Box(left, middle - LINE / 2, right, middle + LINE / 2)
            yield Label(text, side * DISTANCE, rise + BASELINE, anchor, box)


def _covered(box: Box, obstacles: Sequence[Box], inside: Box) -> float:
    return box.area - box.overlap(inside) + sum(box.overlap(each) for each in obstacles)
