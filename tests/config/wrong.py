"""The config `study.yaml` with one thing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lowrank.config.load import check_study, read_config
from lowrank.errors import RankwiseError

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "config/quickstart.yaml"
GONE = object()
STUDY = Path(__file__).with_name("study.yaml")
BASE = read_config(STUDY)

MODEL = ("models", "smollm2-135m")
SOURCE, SHAPE = (*MODEL, "source"), (*MODEL, "shape")
ROW = ("tables", "table_1", "rows", 1)
SELECT = ("validation", "wikipedia-top6", "select")

Change = tuple[tuple[str | int, ...], Any]


def changed(*changes: Change) -> dict[str, Any]:
    """A copy with each place set to a value, or deleted (`GONE`)."""
    raw: dict[str, Any] = copy.deepcopy(BASE)
    for (*above, last), value in changes:
        here: Any = raw
        for step in above:
            here = here[step]
        if value is GONE:
            del here[last]
        else:
            here[last] = copy.deepcopy(value)
    return raw


def errors_of(raw: Any) -> list[str]:
    """The messages for a config, one an entry; empty if it is right."""
    try:
        check_study(raw, "x.yaml")
    except RankwiseError as error:
        head, *lines = str(error).split("\n")
        assert head == f"x.yaml has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
        assert all(line.startswith("  ") and line.strip() for line in lines), lines
        return [line[2:] for line in lines]
    return []
