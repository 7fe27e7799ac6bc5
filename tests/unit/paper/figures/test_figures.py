"""Figures against ratio and by type: the drawn data is the CSV, files are deterministic, series can be told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.paper.figures.axes import round_ticks, tick_text
from lowrank.paper.figures.panels import DOUBLE_COLUMN, SINGLE_COLUMN, balanced
from lowrank.paper.figures.perplexity import draw_perplexity, perplexity_frame
from lowrank.paper.figures.sensitivity import draw_sensitivity, sensitivity_frame
from lowrank.paper.figures.style import COLOURS, Outputs, save_figure, series_style
from lowrank.paper.tables.data import RowResults
from tests.unit.paper.figures import figure_samples as samples

TWO = samples.suite(corpora=2)
VOCABULARY = 32_000


def evaluations(*levels: float, stderr: float | None = 0.02) -> list[Any]:
    """One a seed."""
    return list(samples.compared(levels, stderr=stderr).evaluations[samples.SUITE])


def curves(**levels: list[float]) -> list[RowResults]:
    """The points of methods at 10 %, 20 % and so on."""
    return [
        samples.compared([level], method=name, ratio=10 * (index + 1))
        for name, values in levels.items()
        for index, level in enumerate(values)
    ]


def frame_of(dense: list[Any], points: list[RowResults], suite: PerplexitySuite = TWO) -> pd.DataFrame:
    return perplexity_frame(dense, points, samples.SUITE, suite, VOCABULARY)


def two_families() -> dict[str, Any]:
    return {
        "by-type": samples.sensitivity("llama-2-7b", "llama", worst=4e4),
        "opt": samples.sensitivity("opt-6.7b", "opt", dense=10.8, worst=300.0),
    }


def test_sensitivity_draws_what_its_csv_holds() -> None:
    frame = sensitivity_frame(two_families())
    figure = draw_sensitivity(frame, "Title")
    for axes, study in zip(figure.axes, ["by-type", "opt"], strict=True):
        part = frame[(frame["study"] == study) & (frame["type"] != "dense")]
        expected = {
            str(name): list(zip(points["kept"], points["perplexity"], strict=True))
            for name, points in part.groupby("type")
        }
        assert samples.drawn(axes) == expected
    assert list(frame[(frame["study"] == "opt") & (frame["type"] == "fc2")]["kept"]) == [0.3, 0.5, 0.7, 0.9]


def test_a_type_looks_the_same_in_all_panels_and_the_legend_has_each_once() -> None:
    figure = draw_sensitivity(sensitivity_frame(two_families()), "Title")
    assert [axes.get_title() for axes in figure.axes] == ["llama-2-7b", "opt-6.7b"]
    looks = [samples.looks(axes) for axes in figure.axes]
    assert set(looks[0]) & set(looks[1]) == {"q", "k", "v", "o"}
    assert all(looks[0][name] == looks[1][name] for name in ("q", "k", "v", "o"))
    assert len(set((looks[0] | looks[1]).values())) == 9
    assert samples.legend(figure) == ["dense", "q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2"]
    assert samples.texts_outside(figure) == []


def test_a_figure_of_sensitivity_says_which_text_it_is_on() -> None:
    studies = two_families()
    alike = draw_sensitivity(sensitivity_frame(studies), "Title").legends[0].get_title().get_text()
    assert alike == "text: c4-search, 32 windows of 2048 tokens"
    studies["opt"]["protocol"] |= {"corpus": "wikipedia", "windows": 3}
    frame = sensitivity_frame(studies)
    told = draw_sensitivity(frame, "Title").legends[0].get_title().get_text()
    assert "by-type: c4-search, 32 windows of 2048 tokens" in told
    assert "opt: wikipedia, 3 windows of 2048 tokens" in told
    assert set(frame["corpus"]) == {"c4-search", "wikipedia"}


def test_an_opt_study_alone_has_only_its_own_types() -> None:
    figure = draw_sensitivity(sensitivity_frame({"opt": two_families()["opt"]}), "Title")
    assert samples.legend(figure) == ["dense", "q", "k", "v", "o", "fc1", "fc2"]


def test_two_studies_of_one_model_are_told_apart() -> None:
    studies = {name: samples.sensitivity("tiny", "llama") for name in ("few", "many")}
    figure = draw_sensitivity(sensitivity_frame(studies), "Title")
    assert [axes.get_title() for axes in figure.axes] == ["tiny\nfew", "tiny\nmany"]


@pytest.mark.parametrize(("worst", "scale", "words"), [(9.0, "linear", "error"), (4e4, "log", "error (log scale)")])
def test_sensitivity_is_logarithmic_only_where_the_range_is_wide(worst: float, scale: str, words: str) -> None:
    narrow = samples.sensitivity("opt", "opt", dense=10.8, worst=14.0)
    figure = draw_sensitivity(
        sensitivity_frame({"a": samples.sensitivity("m", "llama", worst=worst), "b": narrow}), "t"
    )
    assert [axes.get_yscale() for axes in figure.axes] == [scale, scale]
    assert figure.axes[0].get_ylabel() == f"perplexity ± standard {words}"


def test_perplexity_has_a_panel_a_corpus_and_averages_over_seeds() -> None:
    data = [samples.compared([20, 22], method="lord", ratio=10), *curves(lord=[20, 30], svd=[50, 900])[1:]]
    frame = frame_of(evaluations(18), data)
    figure = draw_perplexity(frame, "Title")
    assert [axes.get_title() for axes in figure.axes] == TWO.corpora
    assert samples.drawn(figure.axes[0])["lord"] == [(10, 21), (20, 30)]
    assert samples.drawn(figure.axes[1])["svd"] == [(10, 70), (20, 1260)]
    several = frame[frame["sd_over_seeds"].notna()]
    assert list(several["sd_over_seeds"]) == pytest.approx([2**0.5, 1.4 * 2**0.5])
    assert all(axes.get_yscale() == "log" for axes in figure.axes)
    assert samples.legend(figure) == ["dense", "lord", "svd"]
    assert "standard deviation between seeds" in figure.legends[0].get_title().get_text()


def test_the_bar_of_the_seeds_is_as_long_as_their_standard_deviation() -> None:
    figure = draw_perplexity(frame_of(evaluations(18), [samples.compared([20, 21], method="lord", ratio=10)]), "Title")
    (bars,) = [lines for lines in figure.axes[0].collections if lines.get_linewidth()[0] == 4.5]
    (_, low), (_, high) = bars.get_segments()[0]
    mean, sd = 20.5, 0.5**0.5
    assert (low, high) == pytest.approx((mean * np.exp(-sd / mean), mean * np.exp(sd / mean)))


def test_what_is_no_better_than_a_guess_stands_at_the_edge_and_does_not_stretch_the_axis() -> None:
    data = curves(lord=[30, 60], svd=[3e7, 2e8], afm=[50, 4e4])
    frame = frame_of(evaluations(18), data)
    figure = draw_perplexity(frame, "Title")
    for axes, factor in zip(figure.axes, (1.0, 1.4), strict=True):
        low, high = axes.get_ylim()
        assert 16 * factor < low < 18 * factor
        assert 60 * factor < high < 70 * factor
        assert [text.xy for text in axes.texts if text.get_text() == "↑"] == [(10, 1), (20, 1), (20, 1)]
        assert samples.overlaps([text.get_window_extent() for text in axes.texts]) == 0, "side by side"
    assert "no better than a guess (6 values)" in figure.legends[0].get_title().get_text()
    assert samples.legend(figure) == ["dense", "lord", "svd", "afm"]
    assert samples.texts_outside(figure) == []
    assert frame["perplexity"].max() == 2.8e8, "the CSV is complete"
    assert list(frame[frame["no_better_than_a_guess"]]["method"]) == ["svd", "svd", "afm"] * 2


def test_where_all_is_no_better_than_a_guess_all_is_drawn() -> None:
    figure = draw_perplexity(frame_of([], curves(lord=[4e4, 5e5]), samples.suite(1)), "Title")
    assert figure.axes[0].get_ylim()[1] > 5e5
    assert figure.legends[0].get_title().get_text() == ""


def test_a_study_without_a_dense_preset_has_no_dense_line() -> None:
    figure = draw_perplexity(frame_of([], curves(lord=[20, 30])), "Title")
    assert samples.legend(figure) == ["lord"]


@pytest.mark.parametrize("levels", [[18.5, 19.0], [30.0, 60.0], [900.0, 90_000.0], [6.0, 3e7]])
def test_every_range_gets_readable_ticks(levels: list[float]) -> None:
    figure = draw_perplexity(frame_of(evaluations(18), curves(lord=levels)), "Title")
    for axes in figure.axes:
        assert 2 <= len(samples.tick_boxes(axes.yaxis)) <= 8
        assert samples.overlaps(samples.tick_boxes(axes.yaxis)) == 0


@given(low=st.floats(1.0, 1e6), factor=st.floats(1.05, 1e12), most=st.integers(4, 12))
@example(low=548553.3469144194, factor=2.5845437712581942, most=4)
def test_ticks_are_few_distinct_and_inside(low: float, factor: float, most: int) -> None:
    ticks = round_ticks(low, low * factor, most)
    assert 2 <= len(ticks) <= most
    assert all(low <= tick <= low * factor for tick in ticks)
    assert ticks == sorted(set(ticks))
    if factor >= 5:
        assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_large_ticks_are_written_with_an_exponent() -> None:
    assert [tick_text(value) for value in (5, 12.5, 50_000, 100_000, 3e7)] == ["5", "12.5", "50000", "1e5", "3e7"]


@given(st.lists(st.text("abc-", min_size=1, max_size=9), min_size=1, max_size=12).map(" ".join), st.integers(9, 60))
def test_lines_are_balanced_without_a_line_more(text: str, characters: int) -> None:
    lines = balanced(text, characters)
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= characters
    greedy, length = 1, 0
    for word in text.split():
        greedy, length = (
            (greedy, length + 1 + len(word))
            if length + 1 + len(word) <= characters + 1
            else (
                greedy + 1,
                1 + len(word),
            )
        )
    assert len(lines) == greedy


def test_a_smoke_run_says_so_in_the_figure() -> None:
    figure = draw_sensitivity(sensitivity_frame(two_families()), "A long title " * 10, smoke=True)
    assert figure.get_suptitle().endswith("smoke run, not a measurement")
    assert max(map(len, figure.get_suptitle().splitlines())) < 100
    assert samples.texts_outside(figure) == []


@pytest.mark.parametrize(("methods", "corpora"), [(1, 1), (8, 1), (8, 3)])
def test_figures_fit_the_columns_of_a_page_with_readable_text(methods: int, corpora: int) -> None:
    data = curves(**{f"a-method-with-a-long-name-{index}": [20.0 + index, 3e5] for index in range(methods)})
    figure = draw_perplexity(frame_of(evaluations(6), data, samples.suite(corpora)), "Title")
    assert figure.get_figwidth() == (SINGLE_COLUMN if corpora == 1 else DOUBLE_COLUMN)
    assert samples.texts_outside(figure) == []
    assert min(text.get_fontsize() for text in samples.texts(figure)) >= 7


def test_files_are_equal_in_every_run_and_fonts_are_embedded(tmp_path: Path) -> None:
    frame = sensitivity_frame(two_families())
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
    styles = [series_style(index) for index in range(9)]
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == len(styles)
    combinations = {str((s["color"], s["marker"])) for s in map(series_style, range(40))}
    assert len(combinations) == 40


# How people without one kind of cones see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_stay_apart_for_colour_blind_readers(blindness: str) -> None:
    def lab(colour: str) -> np.ndarray:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
        to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
        ratio = to_xyz @ seen / np.array([0.9505, 1.0, 1.0888])
        f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    seen = [lab(colour) for colour in ("black", *COLOURS)]
    distances = [np.linalg.norm(one - two) for index, one in enumerate(seen) for two in seen[:index]]
    assert min(distances) > 15


def test_values_without_an_error_are_drawn_without_bars() -> None:
    bare = evaluations(18, stderr=None)
    frame = frame_of(bare, [samples.compared([18], stderr=None, method="lord", ratio=10)])
    figure = draw_perplexity(frame, "Title")
    samples.settle(figure)
    assert samples.drawn(figure.axes[0])["lord"] == [(10, 18)]
    assert frame["stderr"].isna().all()


def test_wrong_results_are_refused() -> None:
    with pytest.raises(RankwiseError, match=r"sensitivity\.by-type: a result of kind 'cost'"):
        sensitivity_frame({"by-type": {"kind": "cost"}})
    with pytest.raises(RankwiseError, match="at least one study"):
        sensitivity_frame({})
    broken = evaluations(18)
    del broken[0]["corpora"][TWO.corpora[1]]
    with pytest.raises(RankwiseError, match=r"method bolaco, ratio 20.* holds no perplexity on 'c4-validation'"):
        frame_of(broken, curves(lord=[20]))


def test_a_point_that_missed_its_ratio_is_no_point() -> None:
    point = samples.compared([20], method="lord", ratio=10, place="figures.f.methods (lord, 10 %)")
    point.manifests[0]["parameters"]["decoder_linears"] = 91
    with pytest.raises(RankwiseError, match=r"figures\.f\.methods \(lord, 10 %\): lord removed 9\.00 %"):
        frame_of(evaluations(18), [point])
    near = replace(point, row=point.row.model_copy(update={"tolerance": 1.0}))
    assert list(frame_of(evaluations(18), [near])["kept_percent"]) == [100.0, 91.0] * 2
