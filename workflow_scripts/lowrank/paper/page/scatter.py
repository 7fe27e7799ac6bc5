"""Perplexity against size, speed or what is kept, as points of a drawing that a template turns into SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowrank.paper.page.labels import Box, Label, place_labels
from lowrank.paper.page.results import DECODE, PARAMETERS, PREFILL, SIZE, Checkpoint
from lowrank.paper.page.verdict import MIB
from lowrank.paper.tables.measures import Measure
from lowrank.paper.tables.rows import estimate_text, number_text

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40  # of the drawing's units, around the axes
TICKS = 6
ROOM = 0.07  # of the range, beyond the outermost points


@dataclass(frozen=True)
class Axis:
    """From values to places of the drawing; `ticks` are pairs of a place and a text."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands, in units of the drawing."""
        low, high, at = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """At round numbers."""
        from lowrank.paper.figures.axes import even_ticks, round_ticks, tick_text

        found = (round_ticks if self.logarithmic else even_ticks)(self.low, self.high, TICKS)
        return [(self.place(value), tick_text(value)) for value in found]


@dataclass(frozen=True)
class Point:
    """A checkpoint in the drawing.

    Attributes:
        checkpoint: which.
        x, y: place of the mark.
        top, bottom: ends of the error bar; both `y` without one.
        beyond: whether its perplexity lies above the axis, so that the mark stands at the edge.
        title: all numbers, in words.
        label: the ratio beside the mark; the dense model has none.
    """

    checkpoint: Checkpoint
    x: float
    y: float
    top: float
    bottom: float
    beyond: bool
    title: str
    label: Label | None = None


@dataclass(frozen=True)
class Scatter:
    """A drawing: one corpus against one quantity, which is not known of `missing` checkpoints."""

    title: str
    x_label: str
    x: Axis
    y: Axis
    points: Sequence[Point]
    missing: int


@dataclass(frozen=True)
class Quantity:
    """What stands along the horizontal axis."""

    label: str
    read: Callable[[Checkpoint], float | None]


def quantities(found: Sequence[Checkpoint]) -> list[Quantity]:
    """Size and speed as far as they are known: the weights' bytes if they are known of all, else their number."""
    size = Quantity("weights (MiB)", lambda each: each.cost[SIZE] / MIB)
    count = Quantity("parameters (M)", lambda each: each.cost[PARAMETERS] / 1e6)
    shown = [size if all(SIZE in each.cost for each in found) else count]
    for key, label in ((DECODE, "generation (tokens/s)"), (PREFILL, "prompt (tokens/s)")):
        if sum(key in each.cost for each in found) > 1:
            shown.append(Quantity(label, lambda each, key=key: each.cost.get(key)))  # type: ignore[misc]
    return shown


def scatters(
    found: Sequence[Checkpoint], measures: Sequence[Measure], vocabularies: Mapping[str, int]
) -> dict[str, dict[str, list[Scatter]]]:
    """Model -> corpus -> drawings, one for each quantity; of what was measured of at least two checkpoints."""
    drawn: dict[str, dict[str, list[Scatter]]] = {}
    for model in dict.fromkeys(each.row.model for each in found):
        members = [each for each in found if each.row.model == model]
        for measure in measures:
            judged = [each for each in members if measure.key in each.values]
            if measure.kind == "perplexity" and len(judged) > 1:
                made = [_scatter(judged, measure, quantity, vocabularies[model]) for quantity in quantities(judged)]
                drawn.setdefault(model, {})[measure.name] = made
    return drawn


def _scatter(found: Sequence[Checkpoint], measure: Measure, quantity: Quantity, vocabulary: int) -> Scatter:
    known = [(each, value) for each in found if (value := quantity.read(each)) is not None]
    levels = [each.values[measure.key].value for each, _ in known]
    useful = [level for level in levels if level < vocabulary] or levels
    x = axis_of([value for _, value in known], LEFT, WIDTH - RIGHT)
    y = axis_of(useful, HEIGHT - BOTTOM, TOP, logarithmic=True)
    inside = Box(x.start, 0, x.end, y.start)  # and above, where marks stand at the edge
    points = _labelled(list(_points(known, measure, quantity, x, y)), inside)
    return Scatter(measure.name, quantity.label, x, y, points, len(found) - len(known))


def axis_of(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """An axis that holds some values, with a little room at both ends."""
    low, high = min(values), max(values)
    if logarithmic:
        room = (high / low) ** ROOM if high > low else 1.1
        return Axis(low / room, high * room, start, end, logarithmic=True)
    room = (high - low) * ROOM or abs(high) * ROOM or 1.0
    return Axis(low - room, high + room, start, end)


def _points(
    known: Sequence[tuple[Checkpoint, float]], measure: Measure, quantity: Quantity, x: Axis, y: Axis
) -> Iterator[Point]:
    for checkpoint, value in known:
        estimate = checkpoint.values[measure.key]
        relative = (estimate.stderr or 0.0) / estimate.value  # the error is of the loss, whose exponential this is
        ends = [min(max(estimate.value * math.exp(sign * relative), y.low), y.high) for sign in (1, -1)]
        row = checkpoint.row
        removed = f", {row.ratio} % removed" if row.ratio else ""
        text = estimate_text(estimate.value, estimate.stderr, measure.digits)
        yield Point(
            checkpoint,
            x.place(value),
            y.place(min(estimate.value, y.high)),
            y.place(ends[0]),
            y.place(ends[1]),
            estimate.value > y.high,
            f"{row.title}{removed}: perplexity {text}, {quantity.label} {number_text(value, 1)}",
        )


def _labelled(points: Sequence[Point], inside: Box) -> list[Point]:
    marks = [(point.x, point.y, _ratio(point)) for point in points]
    bars = [Box(point.x - 1, point.top, point.x + 1, point.bottom) for point in points]
    labels = place_labels(marks, bars, inside)
    return [replace(point, label=label) for point, label in zip(points, labels, strict=True)]


def _ratio(point: Point) -> str:
    ratio = point.checkpoint.row.ratio
    return (f"{ratio} %" + " ↑" * point.beyond) if ratio else ""
