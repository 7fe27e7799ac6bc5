"""Iterating over the documents and records of text files, with errors that say where in which file."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lowrank.errors import RankwiseError

Record = dict[str, Any]
T = TypeVar("T")


def iter_texts(files: list[Path], form: str, field: str) -> Iterator[str]:
    """The documents of `files`, in their order.

    Args:
        files: the files; a name that ends in `.gz` is decompressed on the way.
        form: `text` (one document a file), `lines` (one a line), or `jsonl`, `json`, `parquet` (one a record).
        field: the column of a record that holds the text.

    Raises:
        RankwiseError: not UTF-8 (with the byte offset), damaged, or a record without the column (with its columns).
    """
    if form == "text":
        yield from (_decode(_read(file), file, 0) for file in files)
    elif form == "lines":
        yield from (line for file in files for _, line in _lines(file))
    else:
        yield from (text_of(record, field, where) for where, record in iter_records(files, form, (field,)))


def iter_records(files: list[Path], form: str, columns: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    """The records of `files`, each with its place for messages.

    Args:
        files: the files.
        form: `jsonl`, `json` (a list of objects) or `parquet`.
        columns: those that are wanted; a parquet file's other columns are not read.

    Raises:
        RankwiseError: damaged file or a record that is no object, with the place.
    """
    read = {"jsonl": _jsonl, "json": _json, "parquet": _parquet}[form]
    for file in files:
        yield from read(file, columns)


def text_of(record: Record, column: str, where: str) -> str:
    """The text in one column; a null is empty text.

    Raises:
        RankwiseError: no such column (the message lists those that there are), or no text in it.
    """
    if column not in record:
        raise RankwiseError(f"{where}: no column '{column}'; there are: {', '.join(sorted(record)) or 'none'}.")
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RankwiseError(f"{where}: column '{column}' holds {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RankwiseError(f"{where}: column '{column}' is no valid Unicode text ({error}).") from error
    return value


def select(items: Iterable[T], documents: tuple[int, int | None]) -> Iterator[T]:
    """The items from `documents[0]` up to, but without, `documents[1]` (None: the end). Nothing beyond is read.

    Raises:
        RankwiseError: there are not so many; the message says how many there are.
    """
    start, stop = documents
    seen = 0
    for seen, item in enumerate(itertools.islice(items, stop), start=1):
        if seen > start:
            yield item
    if seen <= start or (stop is not None and seen < stop):
        asked = f"[{start}, {'null' if stop is None else stop}]"
        raise RankwiseError(f"documents: {asked} is out of range: the source has {seen} documents. Choose from those.")


def _open(file: Path) -> Iterator[bytes]:
    """The lines of a file, with their line ends, decompressed."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise RankwiseError(f"{file}: cannot be read ({error}). If it was downloaded, fetch it again.") from error


def _read(file: Path) -> bytes:
    return b"".join(_open(file))


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RankwiseError(
            f"{file}: no valid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}). "
            "Convert the file to UTF-8."
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1, and lines without their ends; only `\\n` ends a line (JSON may hold other separators)."""
    offset = 0
    for number, line in enumerate(_open(file), start=1):
        yield number, _decode(line, file, offset).rstrip("\r\n")
        offset += len(line)


def _jsonl(file: Path, _: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(file):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _object(_parse(line, where), where)


def _json(file: Path, _: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    rows = _parse(_decode(_read(file), file, 0), str(file))
    if not isinstance(rows, list):
        raise RankwiseError(f"{file}: `format: json` is a list of objects. One object a line is `format: jsonl`.")
    for number, row in enumerate(rows):
        where = f"{file}, record {number}"
        yield where, _object(row, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RankwiseError(f"{where}: no valid JSON: {error}.") from error


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise RankwiseError(f"{where}: a record is a JSON object, not {type(value).__name__}.")
    return value


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        wanted = [column for column in table.schema_arrow.names if column in columns]
        if not wanted:
            names = ", ".join(table.schema_arrow.names)
            raise RankwiseError(f"{file}: no column '{columns[0]}'; there are: {names}.")
        number = itertools.count()
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield f"{file}, row {next(number)}", row
    except (pa.ArrowException, OSError) as error:
        raise RankwiseError(f"{file}: no readable parquet file ({error}). Fetch or make it again.") from error
