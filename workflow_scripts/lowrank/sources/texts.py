"""Corpora and instruction data: from a source of the config to the JSON Lines files that later stages read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.config.sources import Corpus, HubSource, Instructions, TokensSource
from lowrank.errors import RankwiseError
from lowrank.files import atomic_path, sha256_file, write_json
from lowrank.sources import hub, local
from lowrank.sources.disk import require_free
from lowrank.sources.readers import Record, iter_records, iter_texts, select, text_of
from lowrank.sources.resolve import placed, source_files

log = logging.getLogger(__name__)

INSTRUCTION_COLUMNS = ("instruction", "input", "output")


def fetch_corpus(name: str, corpus: Corpus, cache: Path, index: Path, data: Path) -> dict[str, Any]:
    """Write the selected documents (or windows of token ids) of a corpus, and its index.

    `documents` counts every document of the source, empty ones too. Empty ones are kept, and counted in the index:
    the joined text of line-wise corpora (WikiText) depends on them.

    Args:
        name: the corpus's name in the config.
        corpus: its section.
        cache: folder of downloads.
        index: the JSON file to write.
        data: the file of the content: one JSON object with the key `text` a line, or safetensors for token ids.

    Returns:
        The index.

    Raises:
        RankwiseError: the source cannot be had or read, the range is out of range, or all documents are empty.
    """
    with placed(f"corpora.{name}"):
        if isinstance(corpus.source, TokensSource):
            content = _write_tokens(corpus.source, corpus.documents, data)
        else:
            with _texts(corpus, cache) as texts:
                content = _write_documents(select(texts, corpus.documents), data)
        record = {
            "corpus": name,
            "source": corpus.source.plain(),
            **content,
            "file": data.name,
            "range": list(corpus.documents),
            "sha256": sha256_file(data),
        }
        write_json(index, record)
    log.info("corpus %s: %d documents", name, record["documents"])
    return record


def fetch_instructions(name: str, instructions: Instructions, cache: Path, rows: Path) -> int:
    """Write the selected instruction rows, each with `instruction`, `input` (empty if absent) and `output`.

    Rows with an empty instruction or output teach nothing; they are left out, and their count is logged.

    Returns:
        How many rows were written.

    Raises:
        RankwiseError: the source cannot be had or read, a column is missing, or no row is left.
    """
    with placed(f"instructions.{name}"), _records(instructions, cache) as records:
        chosen = (_instruction(record, where) for where, record in select(records, instructions.documents))
        written = skipped = 0
        with atomic_path(rows) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
            for row in chosen:
                if row["instruction"].strip() and row["output"].strip():
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    written += 1
                else:
                    skipped += 1
            if not written:
                raise RankwiseError("no row with an instruction and an output; nothing was written.")
    log.info("instructions %s: %d rows, %d empty ones left out", name, written, skipped)
    return written


@contextmanager
def _texts(corpus: Corpus, cache: Path) -> Iterator[Iterator[str]]:
    """All documents of a corpus's source. A data set of the hub without `file:` is rows whatever `format` says."""
    source = corpus.source
    assert not isinstance(source, TokensSource)
    if isinstance(source, HubSource):
        if source.file:
            yield iter_texts(hub.fetch_files(source), corpus.format, corpus.field)
            return
        dataset = hub.load_rows(source)
        yield (text_of(row, corpus.field, f"{source.hub}, row {n}") for n, row in enumerate(dataset))
        return
    with source_files(source, cache) as files:
        yield iter_texts(files, corpus.format, corpus.field)


@contextmanager
def _records(instructions: Instructions, cache: Path) -> Iterator[Iterator[tuple[str, Record]]]:
    source = instructions.source
    if isinstance(source, HubSource):
        if source.file:
            yield iter_records(hub.fetch_files(source), instructions.format, INSTRUCTION_COLUMNS)
            return
        yield ((f"{source.hub}, row {n}", row) for n, row in enumerate(hub.load_rows(source)))
        return
    with source_files(source, cache) as files:
        yield iter_records(files, instructions.format, INSTRUCTION_COLUMNS)


def _instruction(record: Record, where: str) -> dict[str, str]:
    return {
        column: text_of(record, column, where) if column in record or column != "input" else ""
        for column in INSTRUCTION_COLUMNS
    }


def _write_documents(texts: Iterable[str], data: Path) -> dict[str, Any]:
    documents = characters = empty = 0
    with atomic_path(data) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
            characters += len(text)
            empty += not text.strip()
        if empty == documents:
            raise RankwiseError(f"all {documents} selected documents are empty; nothing was written.")
    if empty:
        log.info("%d of %d documents are empty", empty, documents)
    return {"kind": "documents", "documents": documents, "empty": empty, "characters": characters}


def _write_tokens(source: TokensSource, chosen: tuple[int, int | None], data: Path) -> dict[str, Any]:
    from safetensors.numpy import save_file

    tokens = local.read_tokens(source)
    windows = list(select(range(len(tokens)), chosen))
    tokens = tokens[windows[0] : windows[-1] + 1]
    require_free(data, tokens.nbytes, "the corpus")
    with atomic_path(data) as temporary:
        save_file({"tokens": tokens}, temporary)
    return {"kind": "tokens", "documents": len(tokens), "length": tokens.shape[1], "characters": None}
