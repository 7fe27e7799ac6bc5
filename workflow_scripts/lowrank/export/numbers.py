"""What was measured of a checkpoint, for its model card: the evaluations of the study in which it lies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank.files import read_record, sha256_file
from lowrank.manifest import manifest_of
from lowrank.paper.tables.rows import estimate_text

log = logging.getLogger(__name__)


def measured(checkpoint: Path) -> str:
    """A section of a model card: perplexities and accuracies with their protocols; nothing if there are none.

    Args:
        checkpoint: folder; evaluations are looked for in the results that it is part of.

    Raises:
        RankwiseError: an evaluation is damaged; it is named.
    """
    rows = [row for file in _evaluations(checkpoint.resolve()) for row in _rows(read_record(file))]
    if not rows:
        return ""
    return "\n".join(["## Measured", "", "| what | value | how |", "|---|---|---|", *rows]) + "\n"


def _evaluations(checkpoint: Path) -> list[Path]:
    """The JSONs of a checkpoint's evaluations, by name of the suite."""
    manifest = manifest_of(checkpoint)
    if manifest is None or (subject := read_record(manifest).get("subject")) is None:
        return []
    named = [str(subject[key]) for key in ("model", "method", "ratio", "tuning")]
    tuned = subject["tuning"] != "none"
    place = ("tuned", *named) if tuned else ("compressed", *named[:3])
    where = (*place, f"seed{subject['seed']}", checkpoint.name)
    if checkpoint.parts[-len(where) :] != where:
        return []
    run = checkpoint.parents[len(where) - 1]
    found = sorted(run.joinpath("evaluation", *named, f"seed{subject['seed']}").glob("*.json"))
    return [file for file in found if _is_of(file, run, manifest)]


def _is_of(evaluation: Path, run: Path, manifest: Path) -> bool:
    """Whether an evaluation is of the checkpoint as it is now, by the record of its job; one without a record is.

    A checkpoint that was made anew, and not evaluated again, has those of the one before beside it.
    """
    ours = manifest.relative_to(run.parent).parts
    made_from = {
        checksum
        for file in run.glob(f"records/evaluate_*/{evaluation.relative_to(run / 'evaluation')}")
        for path, checksum in read_record(file)["inputs"].items()
        if Path(path).parts[-len(ours) :] == ours
    }
    if made_from and sha256_file(manifest) not in made_from:
        log.warning("%s: of a checkpoint that was made anew since, so the card leaves its numbers out", evaluation)
        return False
    return True


def _rows(evaluation: Mapping[str, Any]) -> Iterator[str]:
    protocol = evaluation["protocol"]
    smoke = ", a smoke run" if evaluation.get("smoke") else ""
    if evaluation["kind"] == "perplexity":
        for corpus, found in evaluation["corpora"].items():
            how = f"{found['windows']} windows of {protocol['length']} tokens, {protocol['dtype']}"
            yield f"| perplexity, {corpus} | {estimate_text(found['perplexity'], found['stderr'], 2)} | {how} |"
    elif evaluation["kind"] == "zero-shot":
        for task, found in evaluation["tasks"].items():
            metric = found["metric"]
            value = estimate_text(100 * found[metric], 100 * found[f"{metric}_stderr"], 1)
            how = f"{protocol['harness']}, {metric}, {found['documents']} documents, {protocol['dtype']}{smoke}"
            yield f"| {task}, % | {value} | {how} |"
