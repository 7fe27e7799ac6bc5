"""How a job ended, read off the logs that stages write."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.jobs.log_file import TAIL, Ending, ending

BEGUN = "12:00:00 INFO post_train: Python 3.11.7, host h, 2 threads\n"
TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in work
    1 / 0
ZeroDivisionError: division by zero
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (BEGUN + "12:00:09 INFO post_train: finished in 9.2 s, peak memory 55 MiB\n", Ending(seconds=9.2)),
        (BEGUN + "12:00:09 ERROR post_train: a.json: damaged\nsecond line\n", Ending(error="a.json: damaged")),
        (
            BEGUN + "12:00:09 ERROR post_train: unexpected failure; please report it with this log\n" + TRACEBACK,
            Ending(error="ZeroDivisionError: division by zero"),
        ),
        (BEGUN + "12:00:09 INFO loss 2.5\n", Ending()),
        (BEGUN + "x" * 2 * TAIL + "\n12:00:09 INFO post_train: finished in 100.0 s\n", Ending(seconds=100.0)),
        ("", None),
    ],
    ids=["well", "an error", "a bug", "in the middle", "long", "empty"],
)
def test_how_a_job_ended(tmp_path: Path, log: str, expected: Ending | None) -> None:
    file = tmp_path / "a.log"
    assert ending(file) is None
    file.write_text(log)
    assert ending(file) == expected
