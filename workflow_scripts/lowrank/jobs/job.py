"""A job, as far as the library has to know one: what Snakemake hands to a stage."""

from __future__ import annotations

from typing import Any, Protocol


class Job(Protocol):
    """The attributes of a job that locks, logs and records are about.

    Attributes:
        rule: its name.
        input, output, log: paths, by position and by name.
        params, resources, wildcards: values by name.
        threads: how many processors it was given.
    """

    rule: str
    input: Any
    output: Any
    log: Any
    params: Any
    resources: Any
    wildcards: Any
    threads: int
