"""Text that two corpora share, whatever their files are called and in whatever order their documents stand.

Whole documents are compared, and whole windows of token ids, by SHA-256; white space does not count. What is not found:
the same text cut into other documents or windows, and windows made of a text.

Short documents are often the same by chance: lines without words, headings, "Read more". So two corpora share text if
they have a document of `WORDS` words or more in common (a window: of so many tokens), or if what they have in common,
however short each is, holds `SHARE` of the words that are tested, as in a copy of a file of short lines. 50
tokens are the length from which Lee et al. (2022, "Deduplicating training data makes language models better") take
equal text for a duplicate.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.config.tested import Pair
from lowrank.errors import RankwiseError
from lowrank.files import described_file, read_record

log = logging.getLogger(__name__)

WORDS = 50
SHARE = 0.5
SHOWN = 60
"""Characters of a shared document that a message shows."""
SEEN = "What is tested may not have been seen"
"""In every message about text that is both tested and seen."""


class Passage(NamedTuple):
    """A document or window: its words or tokens, how often a corpus has it, and its beginning."""

    words: int
    times: int
    beginning: str


@dataclass(frozen=True)
class Content:
    """What a corpus consists of.

    Attributes:
        kind: `documents`, or `windows` of token ids.
        passages: digest -> document or window, in their order, without empty ones.
        source: where it comes from, in words.
    """

    kind: str
    passages: Mapping[bytes, Passage]
    source: str

    @property
    def count(self) -> int:
        """How many documents or windows are not empty."""
        return sum(passage.times for passage in self.passages.values())

    @property
    def words(self) -> int:
        """How many words or tokens they have."""
        return sum(passage.times * passage.words for passage in self.passages.values())


def compare_texts(pairs: Sequence[Pair], indices: Mapping[str, str | Path]) -> dict[str, Any]:
    """Compare texts that numbers are reported on with those that calibration and validation read.

    Args:
        pairs: which may share nothing.
        indices: corpus -> its index; its data lie in the folder `data` beside that.

    Returns:
        What was compared: `corpora` with their sizes, and for each pair how many documents it shares, all of them too
        short and too few to matter; `compared` is null where one is text and the other windows of token ids.

    Raises:
        RankwiseError: a pair shares text (all such pairs are named), or a file is missing or damaged.
    """
    contents = {corpus: read_content(index) for corpus, index in indices.items()}
    problems, compared = [], []
    for pair in pairs:
        tested, seen = contents[pair.tested], contents[pair.seen]
        common = [passage for digest, passage in tested.passages.items() if digest in seen.passages]
        if is_evidence(common, tested):
            problems.append(_refusal(pair, tested, seen, common))
        compared.append(_outcome(pair, tested, seen, common))
    if problems:
        raise RankwiseError("\n".join(problems))
    return {
        "shared_is": {"words": WORDS, "share": SHARE},
        "corpora": {
            name: {"kind": content.kind, "count": content.count, "words": content.words}
            for name, content in contents.items()
        },
        "pairs": compared,
    }


def _outcome(pair: Pair, tested: Content, seen: Content, common: Sequence[Passage]) -> dict[str, Any]:
    """What the record says of a pair; what a reader may want to look at is logged too."""
    shared = sum(passage.times for passage in common)
    if tested.kind != seen.kind:
        log.warning("'%s' is %s and '%s' %s: not compared", pair.tested, tested.kind, pair.seen, seen.kind)
    elif shared:
        log.info("%d of the %d %s of '%s' are in '%s' too", shared, tested.count, tested.kind, pair.tested, pair.seen)
    return {
        "tested": pair.tested,
        "seen": pair.seen,
        "compared": tested.kind if tested.kind == seen.kind else None,
        "shared": shared,
    }


def is_evidence(common: Sequence[Passage], tested: Content) -> bool:
    """Whether what a tested corpus has in common with another is more than chance (see the module)."""
    shared = sum(passage.times * passage.words for passage in common)
    return any(passage.words >= WORDS for passage in common) or (bool(common) and shared >= SHARE * tested.words)


def read_content(index: str | Path) -> Content:
    """The documents or windows of a fetched corpus.

    Raises:
        RankwiseError: a file is missing or damaged.
    """
    record, data = read_record(index), described_file(index)
    is_text = record["kind"] == "documents"
    passages: dict[bytes, Passage] = {}
    for content, words, beginning in _documents(data) if is_text else _windows(data):
        digest = hashlib.sha256(content).digest()
        times = passages[digest].times if digest in passages else 0
        passages[digest] = Passage(words, times + 1, beginning)
    named = {key: value for key, value in record["source"].items() if value not in (None, False)}
    named["documents"] = json.dumps(record["range"])
    source = ", ".join(f"{key}: {value}" for key, value in named.items())
    return Content("documents" if is_text else "windows", passages, source)


def _documents(data: Path) -> Iterator[tuple[bytes, int, str]]:
    """Content, words and beginning of each document that has words."""
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            words = json.loads(line)["text"].split()
            if words:
                text = " ".join(words)
                yield text.encode(), len(words), text[:SHOWN]


def _windows(data: Path) -> Iterator[tuple[bytes, int, str]]:
    """Content, tokens and first token ids of each window."""
    from safetensors.numpy import load_file

    for window in load_file(data)["tokens"]:
        yield window.astype("<i4").tobytes(), len(window), " ".join(map(str, window.tolist()))[:SHOWN]


def _refusal(pair: Pair, tested: Content, seen: Content, common: Sequence[Passage]) -> str:
    shared = sum(passage.times for passage in common)
    longest = max(common, key=lambda passage: passage.words)
    return (
        f"{', '.join(pair.tested_at)}: {shared} of the {tested.count} {tested.kind} of '{pair.tested}' are in "
        f"'{pair.seen}' too, which {', '.join(pair.seen_at)} read{'s' if len(pair.seen_at) == 1 else ''}; one begins "
        f"{longest.beginning!r}. {SEEN}: give other text to corpora.{pair.tested} "
        f"({tested.source}) or to corpora.{pair.seen} ({seen.source})."
    )
