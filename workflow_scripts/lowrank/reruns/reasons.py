"""Why jobs would run, in plain words: from what a dry run of Snakemake says to what a user has changed."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 60
"""Characters of a value that are shown."""
SHOWN_ENTRY = 200
"""Of an entry of a list that came or went: what it is often stands late in it."""
BY_ANOTHER_JOB = "Input files updated by another job: "
STARTS = (
    *("Missing output", "Incomplete output", "Updated input", "Input files updated", "Set of input", "Params have"),
    *("Forced", "Code has", "Software environment"),
)
"""What a reason in Snakemake's words begins with."""


@dataclass(frozen=True)
class Planned:
    """A job that would run.

    Attributes:
        rule: its name.
        wildcards: their values.
        reason: in Snakemake's words.
        output: paths that it writes.
        commit: of the code that its results were made by, if that is known.
        made: some of its results are there.
    """

    rule: str
    wildcards: dict[str, str]
    reason: str
    output: tuple[str, ...] = ()
    commit: str = ""
    made: bool = False

    @property
    def follows(self) -> bool:
        """Whether it runs only because another job does."""
        return all(part.startswith(BY_ANOTHER_JOB) for part in _parts(self.reason))


def explained(jobs: Sequence[Planned]) -> str:
    """A report: each job that has a reason of its own, and how many follow from them."""
    working = [job for job in jobs if job.output]  # not the targets, which only name files
    if not working:
        return "Nothing would run: all results are there, and nothing that they were made from has changed."
    causes = [job for job in working if not job.follows]
    following = Counter(job.rule for job in working if job.follows)
    groups: dict[tuple[str, ...], list[Planned]] = {}
    for job in causes:
        groups.setdefault(tuple(reasons(job)), []).append(job)
    lines = [f"{_count(len(working), 'job')} would run."]
    for words, group in sorted(groups.items(), key=lambda item: (len(item[1]), str(item[0]))):
        lines += ["", *_named(group), *(f"    {word}" for word in words)]
    if following:
        listing = ", ".join(f"{count} {rule}" for rule, count in sorted(following.items()))
        lines += ["", f"Because they read what those make: {listing}."]
    return "\n".join(lines)


def reasons(job: Planned) -> list[str]:
    """Why a job would run by itself, one sentence a cause."""
    return [words for part in _parts(job.reason) for words in _in_words(part, job)]


def _parts(reason: str) -> list[str]:
    """Snakemake's reasons of one job, which it joins by semicolons."""
    return re.split(f"; (?={'|'.join(STARTS)})", reason)


def _in_words(part: str, job: Planned) -> Iterator[str]:
    head, _, files = part.partition(": ")
    if head == "Missing output files":
        yield f"missing: {files}" if job.made else "not made yet"
    elif head == "Incomplete output files":
        yield "was interrupted before it had finished"
    elif head == "Updated input files":
        yield f"reads what has changed since: {files}"
    elif head == "Params have changed since last execution":
        yield from _changes(files, job.commit)
    elif part.startswith("Set of input files has changed"):
        yield "reads other files than before"
    elif part.startswith("Forced"):
        yield "asked for by force"
    elif part and not part.startswith(BY_ANOTHER_JOB):
        yield part


def _changes(said: str, commit: str) -> Iterator[str]:
    before, now = _before_and_now(said)
    changes = list(differences(before, now))
    for key, old, new in changes:
        if key == "code":
            look = f"; see `git diff {commit[:12]} -- workflow_scripts`" if commit else ""
            yield f"the code that it runs has changed (fingerprint {old} before, {new} now{look})"
        elif key.startswith("packages."):
            yield f"the pinned version of {key.removeprefix('packages.')} {_change(old, new)}"
        else:
            yield f"`{key}` {_change(old, new)}"
    if not changes:
        yield "its settings are written in another way than by an earlier version of this workflow"


def _before_and_now(said: str) -> tuple[Any, Any]:
    """The settings that Snakemake compares; it shows them one after the other."""
    text = said.partition("before: ")[2].strip()
    for split in re.finditer(r" now: ", text):
        try:
            return ast.literal_eval(text[: split.start()]), ast.literal_eval(text[split.end() :])
        except (SyntaxError, ValueError):
            continue
    return {}, {}


class _Absent:
    """In place of a value that is not there."""


ABSENT = _Absent()


def differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key path, value before, value now) wherever two plain values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{place}.{key}" if place else str(key)
            yield from differences(before.get(key, ABSENT), now.get(key, ABSENT), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{place}[{index}]")
    elif before != now or type(before) is not type(now):
        yield place, before, now


def _change(old: Any, new: Any) -> str:
    """What a value was and is; of long ones, what differs."""
    was, now = _text(old), _text(new)
    if max(len(was), len(now)) > SHOWN and isinstance(old, list) and isinstance(new, list):
        return "; ".join([*_entries(new, old, "more"), *_entries(old, new, "less")])
    start = _start(was, now)
    return f"was {_cut(was, start)}, and is {_cut(now, start)}"


def _entries(those: list[Any], others: list[Any], word: str) -> Iterator[str]:
    """What one list has beyond another, however often an entry stands there."""
    left = list((Counter(map(str, those)) - Counter(map(str, others))).elements())
    if left:
        what = f"has one entry {word}: " if len(left) == 1 else f"has {len(left)} entries {word}, the first: "
        yield what + _cut(left[0], 0, SHOWN_ENTRY)


def _text(value: Any) -> str:
    return "not there" if value is ABSENT else str(value)


def _start(one: str, other: str) -> int:
    """Where to begin to show two texts, so that their first difference can be seen."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same - SHOWN // 3 if same > SHOWN // 2 and max(len(one), len(other)) > SHOWN else 0


def _cut(text: str, start: int, length: int = SHOWN) -> str:
    """A part of a text; dots stand for what is left out."""
    part = f"...{text[start:]}" if start else text
    return part if len(part) <= length else f"{part[: length - 3]}..."


def _named(jobs: Sequence[Planned]) -> Iterator[str]:
    """Each job in a line; many of one rule in one."""
    rules: dict[str, list[Planned]] = {}
    for job in jobs:
        rules.setdefault(job.rule, []).append(job)
    for rule, group in rules.items():
        if len(group) > 3:
            yield f"{len(group)} {rule}, such as {_about(group[0])}"
        else:
            yield from (f"{rule}, {_about(job)}" if job.wildcards else rule for job in group)


def _about(job: Planned) -> str:
    return ", ".join(f"{name} {value}" for name, value in job.wildcards.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
