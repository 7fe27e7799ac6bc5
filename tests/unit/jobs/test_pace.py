"""A long loop says how far it is, by a clock that is set by hand; a short one says nothing."""

from __future__ import annotations

import logging

import pytest

from lowrank.jobs.pace import told


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def said(seconds: float, count: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    clock, seen = Clock(), []
    with caplog.at_level(logging.INFO):
        for item in told(range(count), "gradients", clock):
            seen.append(item)
            clock.now += seconds
    assert seen == list(range(count))
    return caplog.messages


def test_every_half_minute_it_is_told_how_far_the_loop_is(caplog: pytest.LogCaptureFixture) -> None:
    assert said(12.0, 8, caplog) == [
        "gradients: 3 of 8 batches, about 60 s left",
        "gradients: 6 of 8 batches, about 24 s left",
    ]


def test_of_slow_items_each_is_told_but_for_the_last(caplog: pytest.LogCaptureFixture) -> None:
    assert len(said(100.0, 4, caplog)) == 3


def test_short_loops_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert said(1.0, 20, caplog) == []
    assert said(1.0, 0, caplog) == []
