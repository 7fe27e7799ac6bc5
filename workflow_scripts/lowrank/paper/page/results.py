"""Everything that was measured of each checkpoint, from the files that tables and figures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.config.outputs import Row
from lowrank.paper.tables.data import Json, RowResults
from lowrank.paper.tables.measures import Measure
from lowrank.paper.tables.rows import Estimate, checkpoints_of, linears_kept, over_seeds

SUBJECT = ("model", "method", "ratio", "tuning")
Key = tuple[str, str, int, str]
SIZE, PARAMETERS = "weight_bytes", "parameters"
PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"


@dataclass(frozen=True)
class Checkpoint:
    """What was measured of a model after a method, a ratio and a tuning, over all seeds.

    Attributes:
        results: its evaluations by suite, and its manifests.
        values: key of a measure -> value.
        kept: percent of the decoder's linear weights.
        cost: `weight_bytes`, `disk_bytes`, `parameters`, and tokens a second by `PREFILL` and `DECODE`; what was not
            measured is missing.
    """

    results: RowResults
    values: Mapping[str, Estimate]
    kept: float
    cost: Mapping[str, float]

    @property
    def row(self) -> Row:
        """Model, method, ratio and tuning."""
        return self.results.row

    @property
    def block(self) -> tuple[str, int]:
        """What it is compared within: model and ratio."""
        return self.row.model, self.row.ratio


def checkpoints(evidence: Mapping[Path, Json], models: Sequence[str], measures: Sequence[Measure]) -> list[Checkpoint]:
    """Every checkpoint that was judged, by model and ratio, in the order of the evidence.

    Args:
        evidence: file -> its content: evaluations, manifests, and others, which are passed over.
        models: names, in the order of the config.
        measures: perplexities and accuracies; an evaluation that is not there leaves its value out.
    """
    rows: dict[Key, RowResults] = {}
    for path, content in evidence.items():
        subject = content["subject"]
        if not all(key in subject for key in SUBJECT):
            continue  # of a model alone: a study of sensitivity, or of truncations
        row = Row(**{key: subject[key] for key in SUBJECT})
        found = rows.setdefault(_key(row), RowResults(row, {}, [], f"{row.model}, {row.title}, {row.ratio} %"))
        _add(found, path.stem, content)
    judged = [found for found in rows.values() if found.evaluations]
    judged.sort(key=lambda found: (models.index(found.row.model), found.row.ratio))
    return [_checkpoint(_with_untuned(found, rows), measures) for found in judged]


def _key(row: Row) -> Key:
    return row.model, row.method, row.ratio, row.tuning


def _add(results: RowResults, suite: str, content: Json) -> None:
    evaluations: Any = results.evaluations
    manifests: Any = results.manifests
    if content.get("kind") in ("perplexity", "zero-shot", "cost", "generation"):
        evaluations.setdefault(suite, []).append(content)
    elif "parameters" in content:
        manifests.append(content)


def _with_untuned(results: RowResults, rows: Mapping[Key, RowResults]) -> RowResults:
    """With the manifests of the checkpoint that post-training began with."""
    row = results.row
    if row.tuning == "none":
        return results
    before = rows.get(_key(row.model_copy(update={"tuning": "none"})))
    return RowResults(
        row, results.evaluations, [*(before.manifests if before else ()), *results.manifests], results.place
    )


def _checkpoint(results: RowResults, measures: Sequence[Measure]) -> Checkpoint:
    values = {}
    for measure in measures:
        pairs = [measure.read(evaluation) for evaluation in results.evaluations.get(measure.suite, ())]
        if pairs:
            values[measure.key] = over_seeds([value for value, _ in pairs], [stderr for _, stderr in pairs])
    return Checkpoint(results, values, *_counted(results))


def _counted(results: RowResults) -> tuple[float, dict[str, float]]:
    """Percent kept, and what it costs: measured, or counted by its manifests."""
    costs = [e for found in results.evaluations.values() for e in found if e["kind"] == "cost"]
    counted = costs or checkpoints_of(results)
    cost = {PARAMETERS: over_seeds([each["parameters"]["total"] for each in counted]).value}
    if costs:
        cost |= {key: over_seeds([each[key] for each in costs]).value for key in (SIZE, "disk_bytes")}
        cost |= {key: over_seeds([each["measured"][key] for each in costs]).value for key in (PREFILL, DECODE)}
    return over_seeds([100 * linears_kept(each["parameters"]) for each in counted]).value, cost
