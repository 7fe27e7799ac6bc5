"""All evaluations of a run as one pandas frame: `results = load_results("results/quickstart")`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.paper.tables.rows import linears_kept

COLUMNS = ("model", "method", "ratio", "tuning", "seed", "suite", "of", "measure", "value", "stderr")
SUBJECT = COLUMNS[:5]
Record = dict[str, Any]


def load_results(run: str | Path) -> pd.DataFrame:
    """Every number of every evaluation of a run, finished or not, one a line.

    Args:
        run: its folder, `results/<run>`.

    Returns:
        A frame with these columns: `model`, `method`, `ratio` (percent removed, 0: dense), `tuning` ("none" without
        post-training) and `seed` say what was evaluated, `suite` by what, `of` on which corpus or task (empty for
        costs), `measure` what `value` is: `perplexity`; `acc` or `acc_norm`, from 0 to 1, the one that the config asks
        for; of costs `parameters`, `linears_kept` (0 to 1), `weight_bytes` (as it runs), `disk_bytes` (as it is
        stored), `prefill_tokens_per_second` and `decode_tokens_per_second`. `stderr` is the standard error of `value`,
        NaN where there is none. Generated texts have no numbers and are left out.

    Raises:
        RankwiseError: the folder has no evaluations, or one of them is damaged.
    """
    folder = Path(run) / "evaluation"
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise RankwiseError(f"{folder}: holds no evaluations. Name the folder of a run, as results/quickstart.")
    records = [record for file in files for record in _records(file)]
    return pd.DataFrame(records, columns=list(COLUMNS)).astype({"value": float, "stderr": float})


def _records(file: Path) -> Iterator[Record]:
    evaluation = read_record(file)
    subject = {key: evaluation["subject"][key] for key in SUBJECT} | {"suite": file.stem}
    for of, measure, value, stderr in _values(evaluation):
        yield subject | {"of": of, "measure": measure, "value": value, "stderr": stderr}


def _values(evaluation: Record) -> Iterator[tuple[str, str, float, float | None]]:
    """(corpus or task, measure, value, standard error) of an evaluation of any kind."""
    match evaluation["kind"]:
        case "perplexity":
            for corpus, found in evaluation["corpora"].items():
                yield corpus, "perplexity", found["perplexity"], found["stderr"]
        case "zero-shot":
            for task, found in evaluation["tasks"].items():
                yield task, found["metric"], found[found["metric"]], found[f"{found['metric']}_stderr"]
        case "cost":
            counts, speed = evaluation["parameters"], evaluation["measured"]
            yield "", "parameters", counts["total"], None
            yield "", "linears_kept", linears_kept(counts), None
            yield "", "weight_bytes", evaluation["weight_bytes"], None
            yield "", "disk_bytes", evaluation["disk_bytes"], None
            for measure in ("prefill_tokens_per_second", "decode_tokens_per_second"):
                yield "", measure, speed[measure], None
