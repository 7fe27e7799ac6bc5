"""What a value and its error look like."""

from __future__ import annotations

import pytest

from lowrank.paper.tables.rows import estimate_text


@pytest.mark.parametrize(
    ("value", "stderr", "digits", "text"),
    [
        (62.13, 1.26, 1, "62.1 ± 1.3"),
        (1234.4, 0.31, 2, "1234 ± 0.3"),
        (1234.4, 31.0, 2, "1234 ± 31"),
        (99_960.0, 12.0, 2, "99960 ± 12"),
        (999_960.0, 12.0, 2, "(1.0 ± 0.00001)e6"),
        (7.9e6, 3.6e6, 2, "(7.9 ± 3.6)e6"),
        (0.5, 0.0, 2, "0.50 ± 0.00"),
        (0.5, 1e-12, 2, "0.50 ± 0.00"),
        (0.5, None, 2, "0.50"),
    ],
)
def test_an_error_that_is_there_is_not_shown_as_none(
    value: float, stderr: float | None, digits: int, text: str
) -> None:
    assert estimate_text(value, stderr, digits) == text
