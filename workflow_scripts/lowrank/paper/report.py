"""One self-contained `report.html`: what came out, tables, figures, what was run, and where each number comes from."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup
from pydantic import TypeAdapter

from lowrank.config.outputs import Row
from lowrank.config.sources import ModelShape
from lowrank.config.suites import Suite
from lowrank.errors import RankwiseError
from lowrank.files import read_record
from lowrank.paper.page.board import leader_board
from lowrank.paper.page.looks import colours, looks_of
from lowrank.paper.page.progress import searches
from lowrank.paper.page.ranks import heat_maps
from lowrank.paper.page.results import Checkpoint, checkpoints
from lowrank.paper.page.scatter import HEIGHT, WIDTH, scatters
from lowrank.paper.page.usage import steps
from lowrank.paper.page.verdict import verdicts
from lowrank.paper.render import html_environment, safe_html
from lowrank.paper.tables.data import MISSING, Context, Json
from lowrank.paper.tables.measures import measures_of

SUBJECT = {"model": "Model", "method": "Method", "ratio": "Removed (%)", "tuning": "Post-training", "seed": "Seed"}


@dataclass(frozen=True)
class Link:
    """A file, as it is linked from the report."""

    text: str
    href: str


@dataclass(frozen=True)
class TableBlock:
    """A table: its HTML fragment, its files, and for each row the files that its numbers come from."""

    name: str
    html: Markup
    links: Sequence[Link]
    evidence: Sequence[tuple[str, Sequence[Link]]]


@dataclass(frozen=True)
class FigureBlock:
    """A figure: its PNG as a data address, and its files."""

    name: str
    title: str
    image: str
    links: Sequence[Link]


@dataclass(frozen=True)
class Result:
    """One line of the list of all results: what it is about ("–" where that does not apply), and its file."""

    subject: Mapping[str, str]
    kind: str
    device: str
    seconds: float
    link: Link


def render_report(settings: Mapping[str, Any], provenance: Json, report: Path) -> str:
    """The report's HTML.

    Args:
        settings: `run`, `smoke`, `seeds`, `models` (name -> source, license, shape), `presets` (any nested dict, with
            the `suites`), `tables` (name -> title, html, csv), `figures` (name -> title, png, pdf, csv), `evidence`
            (paths of the JSONs of evaluations, checkpoints and sensitivity).
        provenance: the content of `provenance.json`.
        report: where the report will lie; links are relative to its folder.

    Raises:
        RankwiseError: an input is missing or damaged.
    """
    folder = report.parent
    evidence = {Path(path): read_record(path) for path in settings["evidence"]}
    results = [_result(path, content, folder) for path, content in evidence.items()]
    checksums = {path.as_posix(): provenance["artefacts"][relative_link(path, folder).href] for path in evidence}
    return (
        html_environment()
        .get_template("report.html.j2")
        .render(
            run=settings["run"],
            smoke=settings["smoke"],
            seeds=settings["seeds"],
            models=[(name, _one_line(model)) for name, model in settings["models"].items()],
            licenses={name: model.get("license") for name, model in settings["models"].items()},
            presets={name: _as_yaml(section) for name, section in settings["presets"].items() if section},
            tables=[_table(name, table, folder) for name, table in settings["tables"].items()],
            figures=[_figure(name, figure, folder) for name, figure in settings["figures"].items()],
            results=results,
            subject=SUBJECT,
            devices=sorted({result.device for result in results}),
            provenance=provenance,
            steps=steps(checksums, folder / "records"),
            **_compared(settings, evidence),
        )
    )


def _compared(settings: Mapping[str, Any], evidence: Mapping[Path, Json]) -> dict[str, Any]:
    """What the page shows of all checkpoints beside each other."""
    suite_type: TypeAdapter[Any] = TypeAdapter(Suite)
    suites = {name: suite_type.validate_python(suite) for name, suite in settings["presets"].get("suites", {}).items()}
    shapes = {name: ModelShape.model_validate(model["shape"]) for name, model in settings["models"].items()}
    vocabularies = {name: shape.vocabulary for name, shape in shapes.items()}
    measures = measures_of(Context(suites=suites))
    found = checkpoints(evidence, list(shapes), measures)
    searched = searches(evidence)
    maps, without_map = heat_maps(found, shapes)
    return {
        "checkpoints": found,
        "looks": looks_of([*(each.row.method for each in found), *(search.row.method for search in searched)]),
        "searches": searched,
        "colours": colours(),
        "verdicts": verdicts(found, measures, vocabularies),
        "scatters": scatters(found, measures, vocabularies),
        "legends": {model: _legend(found, model) for model in shapes},
        "width": WIDTH,
        "height": HEIGHT,
        "board": leader_board(found, measures),
        "maps": maps,
        "without_map": without_map,
    }


def _legend(found: Sequence[Checkpoint], model: str) -> list[Row]:
    """A row for each name that a model's drawings show."""
    return list({each.row.title: each.row for each in found if each.row.model == model}.values())


def relative_link(path: Path, folder: Path, text: str | None = None) -> Link:
    """A link that keeps working when the whole results folder is moved."""
    href = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    return Link(text or href, href)


def row_evidence(csv: Path, folder: Path) -> list[tuple[str, list[Link]]]:
    """For each line of ours in a table's CSV: what it is, and links to its files.

    The CSV names the files relative to its own folder.
    """
    frame = pd.read_csv(csv, keep_default_na=False, dtype="str")
    if "evidence" not in frame:
        return []  # computed from published values and shapes alone
    found: dict[str, dict[str, Link]] = {}
    for record in frame[frame["evidence"] != ""].to_dict(orient="records"):
        name = f"{record['model']}, {record['label']}, {record['target_removed_percent']} % removed"
        for path in str(record["evidence"]).split():
            link = relative_link(csv.parent / path, folder)
            found.setdefault(name, {})[link.href] = link
    return [(name, list(links.values())) for name, links in found.items()]


def _table(name: str, table: Json, folder: Path) -> TableBlock:
    html, csv = Path(table["html"]), Path(table["csv"])
    links = [relative_link(path, folder, text) for path, text in ((csv, "CSV"), (html, "HTML"))]
    return TableBlock(name, safe_html(_read(html).decode("ascii")), links, row_evidence(csv, folder))


def _figure(name: str, figure: Json, folder: Path) -> FigureBlock:
    image = base64.b64encode(_read(Path(figure["png"]))).decode("ascii")
    links = [relative_link(Path(figure[kind]), folder, kind.upper()) for kind in ("pdf", "png", "csv")]
    return FigureBlock(name, figure["title"], f"data:image/png;base64,{image}", links)


def _result(path: Path, content: Json, folder: Path) -> Result:
    subject = {key: str(content["subject"].get(key, MISSING)) for key in SUBJECT}
    return Result(
        subject,
        content.get("kind", "checkpoint"),
        f"{content['environment']['device']}, {content['environment']['machine']}",
        content["seconds"],
        relative_link(path, folder, path.name),
    )


def _one_line(model: Json) -> str:
    source = model["source"]
    if not isinstance(source, dict):
        return str(source)
    return ", ".join(f"{key}: {value}" for key, value in source.items() if value not in (None, False))


def _as_yaml(section: Any) -> str:
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RankwiseError(f"{path}: cannot be read ({error.strerror}). Run the workflow again.") from error
