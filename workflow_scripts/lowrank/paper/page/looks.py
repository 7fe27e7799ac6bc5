"""How methods look in the report's drawings: the colours and marks of the figures, as CSS and SVG have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DENSE = "dense"
_PATHS = {
    "o": "M-4.2,0a4.2,4.2 0 1,0 8.4,0a4.2,4.2 0 1,0 -8.4,0z",
    "s": "M-3.9,-3.9h7.8v7.8h-7.8z",
    "^": "M0,-5L4.8,3.6H-4.8z",
    "D": "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
    "v": "M0,5L4.8,-3.6H-4.8z",
    "P": "M-1.7,-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "X": "M0,-2.3L2.6,-4.9L4.9,-2.6L2.3,0L4.9,2.6L2.6,4.9L0,2.3L-2.6,4.9L-4.9,2.6L-2.3,0L-4.9,-2.6L-2.6,-4.9z",
    "<": "M-5,0L3.6,-4.8V4.8z",
    ">": "M5,0L-3.6,-4.8V4.8z",
    "p": "M0,-5L4.8,-1.5L2.9,4H-2.9L-4.8,-1.5z",
}
"""Matplotlib's markers as SVG paths around the origin."""


@dataclass(frozen=True)
class Look:
    """Number of a colour in the page's style, and the path of a mark."""

    colour: int
    path: str


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """Method -> its look, that of the figures."""
    from lowrank.paper.figures.style import COLOURS, MARKERS, method_looks

    numbers = method_looks(method for method in methods if method != DENSE)
    return {
        name: Look(number % len(COLOURS), _PATHS[MARKERS[number % len(MARKERS)]]) for name, number in numbers.items()
    }


def colours() -> tuple[str, ...]:
    """The colours of the figures; a page darkens or lightens them to its background."""
    from lowrank.paper.figures.style import COLOURS

    return COLOURS
