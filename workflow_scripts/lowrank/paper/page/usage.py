"""What the jobs behind the results took: time and memory by step, from the records that jobs write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank.files import read_record
from lowrank.paper.tables.data import Json


@dataclass(frozen=True)
class Step:
    """All jobs of a rule.

    Attributes:
        rule: its name.
        jobs: how many are behind the results; of `unknown` of them the record does not say what they took.
        seconds, longest: of all, and of the longest.
        peak_mib: largest resident memory of a process; None if unknown.
        gpu_peak_mib: largest memory that torch reserved on a GPU; None on CPUs.
    """

    rule: str
    jobs: int
    unknown: int
    seconds: float
    longest: float
    peak_mib: float | None
    gpu_peak_mib: float | None


def steps(artefacts: Mapping[str, str], records: Path) -> list[Step]:
    """The steps that the artefacts come from, those that took longest first.

    A job is behind an artefact if it wrote that very file, by its checksum, or one that such a job has read.

    Args:
        artefacts: path as the workflow has it -> SHA-256.
        records: folder of the records of the run.

    Raises:
        RankwiseError: a record is damaged.
    """
    found = [read_record(path) for path in sorted(records.rglob("*.json"))]
    wrote = {output: record for record in found for output in record["outputs"].items()}
    by_rule: dict[str, list[Json]] = {}
    for record in _behind(artefacts, wrote):
        by_rule.setdefault(record["rule"], []).append(record)
    made = [_step(rule, members) for rule, members in by_rule.items()]
    return sorted(made, key=lambda step: (-step.seconds, step.rule))


def _behind(artefacts: Mapping[str, str], wrote: Mapping[tuple[str, str], Json]) -> Iterator[Json]:
    pending, seen = list(artefacts.items()), set()
    while pending:
        record = wrote.get(pending.pop())
        if record is not None and id(record) not in seen:
            seen.add(id(record))
            pending.extend(record["inputs"].items())
            yield record


def _step(rule: str, members: list[Json]) -> Step:
    known = [record["usage"] for record in members if "usage" in record]  # records of version 0.1.0 have none
    seconds = [usage["seconds"] for usage in known]
    return Step(
        rule,
        len(members),
        len(members) - len(known),
        sum(seconds),
        max(seconds, default=0.0),
        _largest(known, "peak_mib", "child_peak_mib"),
        _largest(known, "gpu_peak_mib"),
    )


def _largest(usages: list[Json], *names: str) -> float | None:
    return max((usage[name] for usage in usages for name in names if name in usage), default=None)
