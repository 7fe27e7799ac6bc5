"""Jobs and times in words."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank.layout import LOGGED

WITHOUT_A_WORD = "it ended without a word: stopped, killed, or out of memory"
"""Of a job whose log tells neither an error nor that it has finished."""


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def named(rule: str, wildcards: Mapping[str, str]) -> str:
    """`compress_model: smollm2-135m, svd, 20, seed 0`."""
    order = sorted(wildcards, key=lambda name: LOGGED.index(name) if name in LOGGED else -1)
    said = {name: wildcards[name] for name in order if wildcards[name] != "none"}
    parts = [f"{name} {value}" if name == "seed" else value for name, value in said.items()]
    return f"{rule}: {', '.join(parts)}" if parts else rule
