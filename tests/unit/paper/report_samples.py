"""The report of a made-up run of several methods, as a file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lowrank.config.outputs import RowTable
from lowrank.files import sha256_file, write_json, write_text
from lowrank.paper.figures.style import Outputs, save_figure
from lowrank.paper.render import to_csv, to_html
from lowrank.paper.report import render_report
from lowrank.paper.tables import RowResults, build_table
from tests.unit.paper.paper_samples import (
    COST,
    PERPLEXITY,
    SHAPE,
    ZERO_SHOT,
    context,
    dense_results,
    evidence,
    row_results,
)


def sample_rows() -> list[RowResults]:
    """A dense model; at 20 % a slower row, another, and one that was tuned, not timed; at 30 % one that lost it all."""
    tuned = row_results(0.68, tuning="scales", label="LoRD, by name of a rather long label")
    del tuned.evaluations["cost"]  # type: ignore[attr-defined]
    slower = row_results(0.7)
    slower.evaluations["cost"][0]["measured"]["decode_tokens_per_second"] = 11.0
    return [
        dense_results(0.8),
        slower,
        row_results(0.6, method="svd"),
        tuned,
        row_results(0.01, method="svd", ratio=30),
    ]


def render_sample(folder: Path) -> Path:
    """Write the run and its report into a folder; returns the report."""
    rows, report = sample_rows(), folder / "report.html"
    shown = {folder / path: content for path, content in evidence(*rows).items()}
    for path, content in shown.items():
        write_json(path, content)
    table = build_table(
        RowTable(kind="accuracy", title="Main table", rows=[r.row for r in rows]), rows, context(smoke=True)
    )
    files = {kind: folder / f"tables/table_1.{kind}" for kind in ("csv", "html")}
    write_text(files["csv"], to_csv(table))
    write_text(files["html"], to_html(table, "table_1"))
    figure = Outputs(**{kind: folder / f"figures/figure_1.{kind}" for kind in ("pdf", "png", "csv")})
    save_figure(Figure(figsize=(6.8, 2)), table.frame, figure)
    checksums = {path.relative_to(folder).as_posix(): sha256_file(path) for path in shown}
    made = {"rule": "evaluate_perplexity", "inputs": {}, "usage": {"seconds": 12.0, "peak_mib": 900.0}}
    write_json(folder / "records/a.json", made | {"outputs": {p.as_posix(): sha256_file(p) for p in shown}})
    settings = {
        "run": "sample-with-a-name-of-some-length",
        "smoke": True,
        "seeds": [0],
        "models": {"tiny": {"source": {"path": "/m/tiny"}, "license": None, "shape": SHAPE.plain()}},
        "presets": {"suites": {"ppl": PERPLEXITY.plain(), "zs": ZERO_SHOT.plain(), "cost": COST.plain()}},
        "tables": {"table_1": {"title": "Main table", **{kind: str(path) for kind, path in files.items()}}},
        "figures": {"figure_1": {"title": "A figure", **{kind: str(path) for kind, path in vars(figure).items()}}},
        "evidence": list(map(str, shown)),
    }
    provenance = {
        "artefacts": checksums,
        "config_digest": "0" * 64,
        "git": {"commit": "1" * 40, "dirty": False},
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    write_text(report, render_report(settings, provenance, report))
    return report
