"""Texts of one's own for `make compress`: from their paths to the sections of a config that read them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lowrank.config.sources import PathSource
from lowrank.errors import RankwiseError
from lowrank.sources.local import find_files
from lowrank.sources.readers import iter_texts

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet"}
GZIP = ".gz"
_WILDCARD = re.compile(r"\{\s*\w+\s*[,}]")
CHARACTERS_PER_TOKEN = 8
"""A cautious guess, to take no more windows than a short text has; English has about 4.5 characters a token."""
FEWEST = {"calibration": 8, "test": 1}
"""Windows: the presets' covariances pool eight groups."""


def absolute(given: str, key: str) -> Path:
    """Without `..`; links stay, since their names are better than those of what they lead to.

    Args:
        given: a path.
        key: what messages call it.

    Raises:
        RankwiseError: its name is no text, or one that Snakemake reads as a pattern.
    """
    path = Path(os.path.abspath(Path(given).expanduser()))
    shown = os.fsencode(path).decode(errors="replace")
    if shown != str(path):
        raise RankwiseError(f"{key}: {shown}: its name is no UTF-8; rename it, or give a link to it")
    if _WILDCARD.search(shown):
        raise RankwiseError(f"{key}: {shown}: Snakemake takes {{...}} in a name for a wildcard; give a link to it")
    return path


def text_sections(calibration: str, test: str, presets: dict[str, Any], reads: int | None) -> dict[str, Any]:
    """Sections for texts of one's own, and windows that fit a short text or a model that reads little at once.

    Args:
        calibration, test: their paths; empty: the texts of the presets.
        presets: what the sections change.
        reads: tokens that the model reads at once, if it says so.

    Raises:
        RankwiseError: a text that is not there, cannot be read or is too short, or both are the same.
    """
    sections: dict[str, Any] = {}
    for key, given, section, preset in (
        ("calibration", calibration, "calibration", "standard"),
        ("test", test, "suites", "perplexity"),
    ):
        entry = presets[section][preset]
        length = min(entry["length"], reads or entry["length"])
        windows = entry["windows"]
        if given:
            corpus = own_corpus(given, key.upper())
            sections.setdefault("corpora", {})[key] = corpus
            windows = min(windows, _windows(corpus, key, windows, length))
        if (windows, length) != (entry["windows"], entry["length"]):
            sections[section] = {preset: entry | {"windows": windows, "length": length}}
    _require_different(sections.get("corpora", {}))
    cost = presets["suites"]["cost"]
    if reads and reads < cost["prompt_tokens"] + cost["new_tokens"]:
        shorter = {"prompt_tokens": reads - reads // 8, "new_tokens": reads // 8}
        sections.setdefault("suites", {})["cost"] = cost | shorter
    return sections


def _require_different(corpora: dict[str, Any]) -> None:
    """See that no file is given for both calibration and test; what a copy holds is compared when texts are fetched.

    Raises:
        RankwiseError: one is; it is named.
    """
    if {"calibration", "test"} <= corpora.keys():
        seen, tested = (
            {file.resolve(): file for file in find_files(PathSource.model_validate(corpora[key]["source"]))}
            for key in ("calibration", "test")
        )
        if both := [file for resolved, file in tested.items() if resolved in seen]:
            raise RankwiseError(f"TEST: the same text as CALIBRATION ({both[0]}); give another file")


def validation_section(presets: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """The section by which searches validate on the text that is given for calibration, if one is.

    Windows are drawn with another seed than those of the calibration; of a short text some are in both.

    Args:
        presets: what the section changes.
        texts: what `text_sections` gives.
    """
    if "calibration" not in texts.get("corpora", {}):
        return {}
    entry, select = presets["validation"]["standard"], presets["validation"]["standard"]["select"]
    given = texts.get("calibration", {}).get("standard", presets["calibration"]["standard"])
    windows = min(entry["windows"], given["windows"])
    changes = {
        "corpora": ["calibration"],
        "windows": windows,
        "length": given["length"],
        "seed": 1,
        "select": select | {"keep": min(select["keep"], windows)},
    }
    return {"validation": {"standard": entry | changes}}


def own_corpus(given: str, key: str) -> dict[str, Any]:
    """The section of a corpus for a text file, or a folder of text files of one kind.

    Args:
        given: its path.
        key: what messages call it.

    Raises:
        RankwiseError: nothing is there, or no text that can be read.
    """
    path = absolute(given, key)
    kinds = ", ".join(FORMATS)
    if path.is_file():
        if (kind := _kind(path)) is None:
            raise RankwiseError(f"{key}: {path} is no text file of a known kind ({kinds})")
        return {"source": {"path": str(path)}, "format": FORMATS[kind.removesuffix(GZIP)]}
    if not path.is_dir():
        raise RankwiseError(f"{key}: there is no {path}")
    found = sorted({kind for file in path.iterdir() if file.is_file() and (kind := _kind(file))})
    if len(found) != 1:
        what = f"files of several kinds ({', '.join(found)})" if found else f"no text file ({kinds})"
        raise RankwiseError(f"{key}: {path} holds {what}; name a folder with one kind of text files, or a file")
    return {"source": {"path": str(path), "file": f"*{found[0]}"}, "format": FORMATS[found[0].removesuffix(GZIP)]}


def _kind(file: Path) -> str | None:
    """The end of a text file's name, as `.txt` or `.txt.gz`; None for other files, hidden ones and backups."""
    packed = GZIP if file.suffix == GZIP else ""
    suffix = Path(file.name.removesuffix(packed)).suffix
    return suffix + packed if suffix in FORMATS and not file.name.startswith(".") else None


def _windows(corpus: dict[str, Any], key: str, wanted: int, length: int) -> int:
    """For how many windows a text is surely enough; it is read only as far as needed.

    Raises:
        RankwiseError: it cannot be read, or is too short for the fewest.
    """
    source = PathSource.model_validate(corpus["source"])
    size = length * CHARACTERS_PER_TOKEN
    try:
        texts = iter_texts(find_files(source), corpus["format"], "text")
        characters = sum(_until(map(len, texts), wanted * size))
    except RankwiseError as error:
        raise RankwiseError(f"{key.upper()}: {error}") from error
    if (windows := characters // size) < FEWEST[key]:
        raise RankwiseError(
            f"{key.upper()}: {source.path} has {characters:,} characters, and {FEWEST[key] * size:,} are the least "
            f"({FEWEST[key]} x {length} tokens); give more text"
        )
    return windows


def _until(sizes: Iterable[int], enough: int) -> Iterator[int]:
    """The first numbers whose sum is enough."""
    total = 0
    for size in sizes:
        yield size
        total += size
        if total >= enough:
            return
