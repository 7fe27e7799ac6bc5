"""Values that others printed, from `config/published/<file>.csv`: shown beside ours, never mixed with them.

The first comment line of a file is `# source: ...`, the citation; further comment lines are notes for the reader.
The columns `model`, `ratio` and `method` name a row; a table of ranks has one row a group of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from lowrank.config.outputs import ArithmeticTable, PublishedRow, Table
from lowrank.config.study import suggestion
from lowrank.errors import RankwiseError

KEY_COLUMNS = ("model", "ratio", "method")
Values = tuple[dict[str, float | None], ...]


@dataclass(frozen=True)
class Published:
    """What one file prints for one row.

    Attributes:
        reference: the row that the config names.
        citation: where the values were printed.
        notes: what a reader has to know about the file.
        values: one dict a line of the file: column -> value, None where the file says NA.
    """

    reference: PublishedRow
    citation: str
    notes: tuple[str, ...]
    values: Values

    @property
    def title(self) -> str:
        """How the row is marked in every table."""
        return f"published: {self.reference.model}, {self.reference.method}"


def find_published(folder: str | Path, reference: PublishedRow, place: str) -> Published:
    """Look up one row of published values.

    Args:
        folder: the folder of the files, `config/published`.
        reference: file, model, method and ratio.
        place: YAML path of the reference, for messages.

    Raises:
        RankwiseError: no such file, or no such row in it; says what is there.
    """
    path = _file_of(Path(folder), reference, place)
    citation, notes = read_comments(path)
    values = _values_by_row(path, *_state(path)).get((reference.model, reference.ratio, reference.method))
    if values is None:
        raise _not_there(read_published(path), path, reference, place)
    return Published(reference, citation, notes, values)


def _not_there(frame: pd.DataFrame, path: Path, reference: PublishedRow, place: str) -> RankwiseError:
    """Which key of a reference leads nowhere, after those before it."""
    for column in KEY_COLUMNS:
        wanted = getattr(reference, column)
        chosen = frame[frame[column] == wanted]
        if chosen.empty:
            break
        frame = chosen
    known = [str(value) for value in dict.fromkeys(frame[column])]
    hint = suggestion(str(wanted), known)
    return RankwiseError(f"{place}.{column}: '{wanted}' is not in {path}{_of_row(reference, column)}{hint}")


def read_published(path: Path) -> pd.DataFrame:
    """One file of published values, not to be changed.

    Raises:
        RankwiseError: a key column is missing, or a value is no number.
    """
    return _read_published(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file: it is read once, since a study refers to a hundred rows of a few files."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


@cache
def _values_by_row(path: Path, changed: int, size: int) -> dict[tuple[str, int, str], Values]:
    """(model, ratio, method) -> the values of its lines."""
    found: dict[tuple[str, int, str], Values] = {}
    for line in _read_published(path, changed, size).to_dict(orient="records"):
        key = (line.pop("model"), line.pop("ratio"), line.pop("method"))
        values = {str(name): None if pd.isna(value) else float(value) for name, value in line.items()}
        found[key] = (*found.get(key, ()), values)
    return found


@cache
def _read_published(path: Path, changed: int, size: int) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, comment="#", dtype={"model": "str", "method": "str"})
    except (ValueError, OSError) as error:
        raise RankwiseError(f"{path}: no readable CSV file ({error}).") from error
    if missing := [column for column in KEY_COLUMNS if column not in frame.columns]:
        raise RankwiseError(f"{path}: the column{'s' * (len(missing) > 1)} {', '.join(missing)} must be there.")
    for column in frame.columns.drop(["model", "method"]):
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise RankwiseError(f"{path}: column '{column}' holds something that is no number (write NA for none).")
    return frame


def read_comments(path: Path) -> tuple[str, tuple[str, ...]]:
    """Citation and notes of a file of published values.

    Raises:
        RankwiseError: the file cannot be read, or the first line does not cite a source.
    """
    return _read_comments(path, *_state(path))


@cache
def _read_comments(path: Path, changed: int, size: int) -> tuple[str, tuple[str, ...]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark before the first line
    except (UnicodeDecodeError, OSError) as error:
        raise RankwiseError(f"{path}: no readable CSV file ({error}); it must be UTF-8.") from error
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    if not lines or not lines[0].startswith("source: "):
        raise RankwiseError(f"{path}: the first line must cite where the values were printed: `# source: ...`.")
    return lines[0].removeprefix("source: "), tuple(lines[1:])


def single_values(published: Published, place: str) -> dict[str, float | None]:
    """The one line of a published row.

    Raises:
        RankwiseError: the file has several lines for it.
    """
    if len(published.values) != 1:
        raise RankwiseError(
            f"{place}: {len(published.values)} lines of {published.reference.file}.csv answer to it, and a table of "
            "this kind shows one"
        )
    return published.values[0]


def published_problems(tables: dict[str, Table], folder: str | Path) -> list[str]:
    """The message of every reference to published values that leads nowhere, or to what its table cannot show."""
    problems = []
    for name, table in tables.items():
        for place, reference in published_references(table):
            path = f"tables.{name}.{place}"
            try:
                found = find_published(folder, reference, path)
            except RankwiseError as error:
                problems.append(str(error))
                continue
            if why := _why_not_shown(table.kind, found):
                others = ", ".join(_other_files(table.kind, reference, Path(folder)))
                cure = f"name another `file` ({others}), or leave it out" if others else "leave it out"
                problems.append(f"{path}: {why}; {cure}")
    return problems


def _why_not_shown(kind: str, published: Published) -> str | None:
    """Why a table of some kind cannot show what was published, or None if it can."""
    lines, file = len(published.values), published.reference.file
    if kind in ("accuracy", "statistics") and lines != 1:
        return f"{lines} lines of {file}.csv answer to it, and a table of {kind} shows one"
    if kind == "allocations" and "group" not in published.values[0]:
        return f"{file}.csv prints no ranks (it has no column `group`)"
    return None


def _other_files(kind: str, reference: PublishedRow, folder: Path) -> Iterator[str]:
    """The files that have the same row in a form that a table of this kind can show."""
    for path in sorted(folder.glob("*.csv")):
        try:
            found = find_published(folder, reference.model_copy(update={"file": path.stem}), "")
        except RankwiseError:
            continue
        if _why_not_shown(kind, found) is None:
            yield path.stem


def published_references(table: Table) -> Iterator[tuple[str, PublishedRow]]:
    """(YAML path within the table, reference) of everything published that a table shows."""
    for index, row in enumerate(table.rows):
        if row.published is not None:
            yield f"rows[{index}].published", row.published
    for index, check in enumerate(table.checks if isinstance(table, ArithmeticTable) else ()):
        yield f"checks[{index}].ranks", check.ranks
        yield f"checks[{index}].statistics", check.statistics


def _file_of(folder: Path, reference: PublishedRow, place: str) -> Path:
    path = folder / f"{reference.file}.csv"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.csv"))
        raise RankwiseError(f"{place}.file: there is no {path}{suggestion(reference.file, known)}")
    return path


def _of_row(reference: PublishedRow, column: str) -> str:
    """What was already found when the look-up failed, so that the list of suggestions makes sense."""
    found = KEY_COLUMNS[: KEY_COLUMNS.index(column)]
    return " with " + ", ".join(f"{key} '{getattr(reference, key)}'" for key in found) if found else ""
