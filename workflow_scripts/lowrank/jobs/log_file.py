"""The log of a job, read again: how it ended, and what it said last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FINISHED = "finished in %.1f s"
"""What a job says last if all went well; its seconds go in."""
TAIL = 1 << 16  # bytes; the end of a log is a line or a traceback

_LINE = re.compile(r"^\d\d:\d\d:\d\d (?P<level>[A-Z]+) (?P<rule>\w+): (?P<text>.*)$")
_FINISHED = re.compile(re.escape(FINISHED).replace(r"%\.1f", r"([\d.]+)"))
_EXCEPTION = re.compile(r"^[\w.]+(Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class Ending:
    """How a job ended, as far as its log tells.

    Attributes:
        seconds: that it took; None if it did not come to its end.
        error: its error in one line; empty if it told none.
    """

    seconds: float | None = None
    error: str = ""


def ending(log: Path) -> Ending | None:
    """How the job of a log ended; None if there is no log, or nothing in it."""
    lines = _last_lines(log)
    if not lines:
        return None
    for index in reversed(range(len(lines))):
        if (found := _LINE.match(lines[index])) is None:
            continue
        if done := _FINISHED.match(found["text"]):
            return Ending(seconds=float(done[1]))
        if found["level"] == "ERROR":
            # An exception that nobody expected stands at the end of its traceback.
            thrown = next((line for line in reversed(lines[index + 1 :]) if _EXCEPTION.match(line)), "")
            return Ending(error=thrown or found["text"])
    return Ending()


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL))
            return stream.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
