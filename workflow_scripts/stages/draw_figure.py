"""Draw one figure: PDF, PNG and the CSV of what is drawn."""

from pathlib import Path

from snakemake.iocontainers import Snakemake

from lowrank.config.suites import PerplexitySuite
from lowrank.files import read_json
from lowrank.paper.figures.perplexity import draw_perplexity, perplexity_frame
from lowrank.paper.figures.sensitivity import draw_sensitivity, sensitivity_frame
from lowrank.paper.figures.style import Outputs, save_figure
from lowrank.stage import run_stage


def work(job: Snakemake) -> None:
    """Read the results that the rule names, draw them, write the three files."""
    settings = job.params.settings
    title, smoke, results = settings["figure"]["title"], settings["smoke"], settings["results"]
    if settings["figure"]["kind"] == "sensitivity":
        frame = sensitivity_frame(read_json(results["sensitivity"][0]))
        figure = draw_sensitivity(frame, title, smoke)
    else:
        dense = [read_json(path) for path in results["dense"]]
        curves = {
            method: {ratio: [read_json(path) for path in paths] for ratio, paths in curve.items()}
            for method, curve in results["curves"].items()
        }
        frame = perplexity_frame(dense, curves, PerplexitySuite.model_validate(results["suite"]))
        figure = draw_perplexity(frame, title, smoke)
    save_figure(figure, frame, Outputs(Path(job.output.pdf), Path(job.output.png), Path(job.output.csv)))


snakemake: Snakemake  # Snakemake binds it when it runs this file
run_stage(snakemake, work)
