"""Draw one figure: PDF, PNG and the CSV of what is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from snakemake.iocontainers import Snakemake

from lowrank.config.outputs import PerplexityFigure, Row
from lowrank.config.presets import Search
from lowrank.config.suites import PerplexitySuite
from lowrank.files import read_record
from lowrank.jobs.stage import run_stage
from lowrank.paper.figures.comparison import comparison_frame, draw_comparison
from lowrank.paper.figures.heat_map import draw_heat_map, heat_map_frame
from lowrank.paper.figures.perplexity import draw_perplexity, perplexity_frame
from lowrank.paper.figures.predicted_loss import draw_predicted_loss, predicted_loss_frame
from lowrank.paper.figures.search import Judge, draw_search, read_trials, search_frame
from lowrank.paper.figures.sensitivity import draw_sensitivity, sensitivity_frame
from lowrank.paper.figures.style import Outputs, save_figure
from lowrank.paper.tables.data import RowResults

Settings = dict[str, Any]


def sensitivity(settings: Settings) -> pd.DataFrame:
    """What a figure of sensitivity shows."""
    studies, paths = settings["figure"]["sensitivity"], settings["results"]["sensitivity"]
    return sensitivity_frame({study: read_record(path) for study, path in zip(studies, paths, strict=True)})


def perplexity(settings: Settings) -> pd.DataFrame:
    """What a figure of perplexity against ratio shows."""
    figure, results = PerplexityFigure.model_validate(settings["figure"]), settings["results"]
    dense = [read_record(path) for path in results["dense"]]
    suite = PerplexitySuite.model_validate(results["suite"])
    points = [
        _results(settings, figure.point(method, int(ratio)), found, f"methods ({method}, {ratio} %)")
        for method, curve in results["curves"].items()
        for ratio, found in curve.items()
    ]
    return perplexity_frame(dense, points, figure.suite, suite, settings["vocabulary"])


def predicted_loss(settings: Settings) -> pd.DataFrame:
    """What a figure of predicted losses shows."""
    results: dict[str, str] = settings["results"]["truncations"]
    return predicted_loss_frame({preset: read_record(path) for preset, path in results.items()})


def _rows(settings: Settings) -> list[RowResults]:
    """The rows of a comparison with what was measured of them."""
    return [
        _results(settings, Row.model_validate(found["row"]), found, f"rows[{index}]")
        for index, found in enumerate(settings["results"]["rows"])
    ]


def _results(settings: Settings, row: Row, found: dict[str, list[str]], place: str) -> RowResults:
    """What was measured of a row, from its files."""
    return RowResults(
        row=row,
        evaluations={settings["figure"]["suite"]: [read_record(path) for path in found["evaluations"]]},
        manifests=[read_record(path) for path in found["manifests"]],
        place=f"figures.{settings['name']}.{place}",
    )


def comparison(settings: Settings) -> pd.DataFrame:
    """What a comparison of rows shows."""
    suite = PerplexitySuite.model_validate(settings["results"]["suite"])
    return comparison_frame(_rows(settings), settings["figure"]["suite"], suite)


def heat_map(settings: Settings) -> pd.DataFrame:
    """What a heat map of rows shows."""
    suite = PerplexitySuite.model_validate(settings["results"]["suite"])
    return heat_map_frame(_rows(settings), settings["figure"]["suite"], suite)


def search(settings: Settings) -> pd.DataFrame:
    """What a figure of searches shows."""
    trials = {
        method: {ratio: [read_trials(Path(path)) for path in paths] for ratio, paths in curve.items()}
        for method, curve in settings["results"]["trials"].items()
    }
    judges = {
        method: Judge(judge["validation"], Search.model_validate(judge["search"]))
        for method, judge in settings["judges"].items()
    }
    return search_frame(trials, judges)


KINDS: dict[str, tuple[Callable[[Settings], pd.DataFrame], Callable[[pd.DataFrame, str, bool], Figure]]] = {
    "sensitivity": (sensitivity, draw_sensitivity),
    "perplexity": (perplexity, draw_perplexity),
    "comparison": (comparison, draw_comparison),
    "heat-map": (heat_map, draw_heat_map),
    "search": (search, draw_search),
    "predicted-loss": (predicted_loss, draw_predicted_loss),
}


def work(job: Snakemake) -> None:
    """Read the results that the rule names, draw them, write the three files."""
    settings = job.params.settings
    frame_of, draw = KINDS[settings["figure"]["kind"]]
    frame = frame_of(settings)
    figure = draw(frame, settings["figure"]["title"], settings["smoke"])
    save_figure(figure, frame, Outputs(Path(job.output.pdf), Path(job.output.png), Path(job.output.csv)))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)
