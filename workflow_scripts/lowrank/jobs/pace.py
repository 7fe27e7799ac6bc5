"""How far a long loop has come, for whoever reads the log of a job meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
SILENT = 30.0
"""Seconds after which a loop says how far it is."""


def told(items: Sequence[Item], what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Item]:
    """The items one by one; every half minute the log says how many are done and about how long the rest will take.

    Args:
        items: what the loop goes through; each takes about as long as the others.
        what: the loop, in the log's words.
        clock: seconds.
    """
    began = said = clock()
    for done, item in enumerate(items):
        now = clock()
        if done and now - said >= SILENT:
            left = (now - began) / done * (len(items) - done)
            log.info("%s: %d of %d batches, about %.0f s left", what, done, len(items), left)
            said = now
        yield item
