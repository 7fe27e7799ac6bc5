"""Figures: the drawn data is the CSV, files are deterministic and self-contained, series can be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from paper_samples import PERPLEXITY, perplexity, sensitivity

from lowrank.config.outputs import Row
from lowrank.errors import RankwiseError
from lowrank.paper.figures.perplexity import draw_perplexity, perplexity_frame
from lowrank.paper.figures.sensitivity import draw_sensitivity, sensitivity_frame
from lowrank.paper.figures.style import Outputs, save_figure, series_style

ROW = Row(model="tiny", method="lord", ratio=20)


def curves(**levels: list[float]) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {str(10 * (index + 1)): [perplexity(ROW, level)] for index, level in enumerate(values)}
        for name, values in levels.items()
    }


def drawn(figure: Figure, axes: int = 0) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of the series of one panel."""
    found = {}
    for container in figure.axes[axes].containers:
        line = container[0]
        found[str(container.get_label())] = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
    return found


def test_sensitivity_draws_what_its_csv_holds() -> None:
    frame = sensitivity_frame(sensitivity())
    figure = draw_sensitivity(frame, "Title")
    expected = {
        str(name): list(zip(points["kept"], points["perplexity"], strict=True))
        for name, points in frame[frame["type"] != "dense"].groupby("type")
    }
    assert drawn(figure) == expected
    assert list(frame.columns) == ["type", "kept", "removed_of_linears", "perplexity", "stderr"]
    assert list(frame[frame["type"] == "v"]["kept"]) == [0.2, 0.4, 0.6, 0.8]


def test_sensitivity_is_logarithmic_only_where_the_range_is_wide() -> None:
    result = sensitivity()
    assert draw_sensitivity(sensitivity_frame(result), "t").axes[0].get_yscale() == "log"
    del result["types"]["v"], result["types"]["down"]
    assert draw_sensitivity(sensitivity_frame(result), "t").axes[0].get_yscale() == "linear"


def test_perplexity_has_a_panel_a_corpus_and_averages_over_seeds() -> None:
    data = curves(lord=[20, 30], svd=[50, 900])
    data["lord"]["10"].append(perplexity(ROW, 22, seed=1))
    frame = perplexity_frame([perplexity(ROW, 18)], data, PERPLEXITY)
    figure = draw_perplexity(frame, "Title")
    assert [axes.get_title() for axes in figure.axes] == PERPLEXITY.corpora
    assert drawn(figure)["lord"] == [(10, 21), (20, 30)]
    assert drawn(figure, 1)["svd"] == [(10, 100), (20, 1800)]
    assert frame["sd_over_seeds"].notna().sum() == len(PERPLEXITY.corpora)
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dense", "lord", "svd"]


@pytest.mark.parametrize("levels", [[18.5, 19.0], [30.0, 60.0], [900.0, 90_000.0]])
def test_every_range_gets_readable_ticks(levels: list[float]) -> None:
    frame = perplexity_frame([perplexity(ROW, 18)], curves(lord=levels), PERPLEXITY)
    figure = draw_perplexity(frame, "Title")
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    texts = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert 2 <= len(texts) <= 13
    assert len(set(texts)) == len(texts)


def test_a_smoke_run_says_so_in_the_figure() -> None:
    figure = draw_sensitivity(sensitivity_frame(sensitivity()), "A long title " * 10, smoke=True)
    assert figure.get_suptitle().endswith("smoke run, not a measurement")
    assert max(map(len, figure.get_suptitle().splitlines())) < 80


def test_files_are_equal_in_every_run_and_fonts_are_embedded(tmp_path: Path) -> None:
    frame = sensitivity_frame(sensitivity())
    contents = []
    for name in ("one", "two"):
        outputs = Outputs(*(tmp_path / name / f"figure.{kind}" for kind in ("pdf", "png", "csv")))
        save_figure(draw_sensitivity(frame, "Title"), frame, outputs)
        contents.append([path.read_bytes() for path in (outputs.pdf, outputs.png, outputs.csv)])
    assert contents[0] == contents[1]
    pdf, png, _ = contents[0]
    assert b"/FontFile2" in pdf
    assert b"/CreationDate" not in pdf
    assert b"/Subtype /Type3" not in pdf
    assert png.startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "one" / "figure.csv"), frame)


def test_series_differ_in_colour_marker_and_dashes() -> None:
    styles = [series_style(index) for index in range(7)]
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == len(styles)
    combinations = {str((s["color"], s["marker"])) for s in map(series_style, range(40))}
    assert len(combinations) == 40


def test_values_without_an_error_are_drawn_without_bars() -> None:
    bare = perplexity(ROW, 18)
    for result in bare["corpora"].values():
        result["stderr"] = None
    frame = perplexity_frame([bare], {"lord": {"10": [bare]}}, PERPLEXITY)
    figure = draw_perplexity(frame, "Title")
    figure.canvas.draw()
    assert drawn(figure)["lord"] == [(10, 18)]
    assert frame["stderr"].isna().all()


def test_wrong_results_are_refused() -> None:
    with pytest.raises(RankwiseError, match="kind 'cost'"):
        sensitivity_frame({"kind": "cost"})
    broken = perplexity(ROW, 18)
    del broken["corpora"]["speeches"]
    with pytest.raises(RankwiseError, match="holds no perplexity on 'speeches'"):
        perplexity_frame([broken], curves(lord=[20]), PERPLEXITY)
