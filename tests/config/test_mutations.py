"""Random damage to a right config ends in a message or in a right config, never in another exception."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from tests.config.wrong import BASE, QUICKSTART, errors_of

KEYS = sorted({"<<", "kind", "source", "hub", "tokens", "uncompressed", "none", *BASE, *BASE["methods"]})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=0, max_value=100),
    st.integers(min_value=10**300, max_value=10**310),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*KEYS, "1e-3", "20", "\ud800", "a\nb", "; touch x", b"x", datetime.date(2024, 1, 1)]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS), SCALARS), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of a config."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [path for step, inner in items for path in [(*above, step), *places(inner, (*above, step))]]


def holds(container: Any, step: Any) -> bool:
    if isinstance(container, dict):
        return step in container
    return isinstance(container, list) and isinstance(step, int) and step < len(container)


def broken(raw: Any, path: tuple[Any, ...], action: str, key: Any, value: Any) -> None:
    """Change one place, unless an earlier change removed it."""
    for step in path[:-1]:
        if not holds(raw, step):
            return
        raw = raw[step]
    last = path[-1]
    if not holds(raw, last):
        return
    if action == "delete":
        del raw[last]
    elif action == "replace":
        raw[last] = value
    elif isinstance(raw, dict):
        raw[key] = value
    else:
        raw.insert(last, value)


def check_file(path: Path) -> list[str]:
    """The messages for a file; none if it is right."""
    try:
        raw = read_yaml(path)
    except RankwiseError as error:
        lines = str(error).split("\n")
    else:
        return errors_of(raw)
    assert [line.startswith(str(path)) for line in lines] == [True]
    return lines


CHANGES = st.tuples(
    st.sampled_from(places(BASE)),
    st.sampled_from(["replace", "delete", "insert"]),
    st.one_of(st.sampled_from(KEYS), SCALARS),
    VALUES,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_damage_never_ends_in_a_traceback(changes: list[tuple[Any, ...]]) -> None:
    raw = copy.deepcopy(BASE)
    for change in changes:
        broken(raw, *change)
    for line in errors_of(raw):
        assert line.isprintable()
        assert len(line) < 1000
        for jargon in ("Input should", "valid dictionary", "union_tag", "instance of", "validation error"):
            assert jargon not in line


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_value_as_a_whole_config(value: Any) -> None:
    assert errors_of(value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
def test_bytes_written_into_the_file_never_end_in_a_traceback(tmp_path: Path, where: int, junk: bytes) -> None:
    content = QUICKSTART.read_bytes()[:2000]
    position = where % len(content)
    path = tmp_path / "x.yaml"
    path.write_bytes(content[:position] + junk + content[position + len(junk) :])
    check_file(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=":-?[]{},&*!|>'\"%@`#~<= \t\nab01._", max_size=25))
def test_yaml_characters_in_any_order_never_end_in_a_traceback(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content, encoding="utf-8")
    assert check_file(path)
