"""The heat map of rows on several kinds of text: numbers, the best of a column and what is level with it, looks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from lowrank.errors import RankwiseError
from lowrank.paper.figures.heat_map import BOUNDS, draw_heat_map, heat_map_frame
from lowrank.paper.tables.data import RowResults
from tests.unit.paper.figures import figure_samples as samples
from tests.unit.paper.figures.figure_samples import SUITE, compared

WINDOWS = 24
COMMON = np.random.default_rng(0).normal(0, 0.5, WINDOWS)
"""What is hard about each window, for every row."""


def judged(losses: Sequence[float], noise: float = 0.01, seed: int = 1, **row: object) -> RowResults:
    """A row with the mean loss of each corpus; windows differ by what they have in common, and by some noise."""
    results = compared([1.0], **row)
    draw = np.random.default_rng(seed)
    for (_, found), loss in zip(results.evaluations[SUITE][0]["corpora"].items(), losses, strict=True):
        noisy = draw.normal(0, noise, WINDOWS)
        found["window_nll"] = (loss + COMMON + noisy - (COMMON + noisy).mean()).tolist()
        found["window_tokens"] = [255] * WINDOWS
        found["tokens_sha256"] = "0" * 64
        found["perplexity"] = math.exp(loss)
    return results


DENSE = judged([3.0, 3.2, 2.8], method="dense", ratio=0)
ROWS = [
    DENSE,
    judged([3.2, 3.6, 3.1], label="on C4"),
    judged([3.5, 3.3, 3.101], label="on Wikipedia", seed=2),
    judged([3.9, 4.0, 3.5], label="on C4", ratio=30),
    judged([12.0, 3.9, 3.6], label="on Wikipedia", ratio=30, seed=2),
]


def frame_of(rows: list[RowResults] = ROWS) -> pd.DataFrame:
    return heat_map_frame(rows, SUITE, samples.suite())


def test_a_row_that_missed_its_ratio_is_refused() -> None:
    missed = judged([3.2, 3.6, 3.1])
    missed.manifests[0]["parameters"]["decoder_linears"] = 82
    with pytest.raises(RankwiseError, match=r"removed 18\.00 %"):
        frame_of([DENSE, missed])


def test_the_frame_has_the_rise_over_dense_and_what_a_row_is_behind_the_best() -> None:
    frame = frame_of()
    assert len(frame) == 3 * (len(ROWS) - 1)
    one = frame[(frame["label"] == "on Wikipedia") & (frame["ratio"] == 20)].set_index("corpus")
    first, second, third = samples.CORPORA
    np.testing.assert_allclose(one["loss_rise"], [0.5, 0.1, 0.301], atol=1e-9)
    np.testing.assert_allclose(one["behind"], [0.3, 0.0, 0.001], atol=1e-9)
    assert one["mark"].to_dict() == {first: "", second: "best", third: "level"}
    paired = np.array(ROWS[2].evaluations[SUITE][0]["corpora"][first]["window_nll"])
    paired = paired - np.array(ROWS[1].evaluations[SUITE][0]["corpora"][first]["window_nll"])
    assert one.loc[first, "behind_stderr"] == pytest.approx(paired.std(ddof=1) / math.sqrt(WINDOWS))


def test_a_difference_beyond_one_standard_error_is_not_level() -> None:
    rows = [DENSE, judged([3.2] * 3, label="a"), judged([3.2, 3.21, 3.2], label="b", seed=2)]
    frame = heat_map_frame(rows, SUITE, samples.suite())
    assert frame[frame["label"] == "b"]["mark"].tolist() == ["level", "", "level"]


def test_it_needs_the_dense_row_a_compressed_one_and_names_that_differ() -> None:
    with pytest.raises(RankwiseError, match="needs the dense row of llama-2-7b"):
        frame_of(ROWS[1:])
    with pytest.raises(RankwiseError, match="at least one compressed row"):
        frame_of(ROWS[:1])
    with pytest.raises(RankwiseError, match="'on C4' of llama-2-7b at 20 % stands in"):
        frame_of([*ROWS, ROWS[1]])


def test_rows_on_other_windows_are_refused() -> None:
    other = judged([3.2] * 3, label="elsewhere")
    other.evaluations[SUITE][0]["corpora"]["ptb-test"]["tokens_sha256"] = "1" * 64
    with pytest.raises(RankwiseError, match="'ptb-test' was scored on other texts"):
        frame_of([*ROWS, other])


@pytest.mark.parametrize("rows", [ROWS, [*ROWS, judged([3.3] * 3, label="on a mixture of all of the three")]])
def test_a_panel_a_ratio_a_cell_a_row_and_corpus_with_the_best_framed(rows: list[RowResults]) -> None:
    frame = frame_of(rows)
    figure = draw_heat_map(frame, "Title", smoke=True)
    assert [axes.get_title() for axes in figure.axes] == ["20\u00a0% removed", "30\u00a0% removed"]
    for axes, (_, part) in zip(figure.axes, frame.groupby("ratio"), strict=True):
        texts = {tuple(text.get_position()): text.get_text() for text in axes.texts}
        assert len(texts) == len(part)
        labels = list(dict.fromkeys(part["label"]))
        marked: dict[str, set[tuple[int, int]]] = {"best": set(), "level": set(), "": set()}
        for cell in part.to_dict(orient="records"):
            at = (list(samples.CORPORA).index(cell["corpus"]), labels.index(cell["label"]))
            assert float(texts[at]) == pytest.approx(cell["perplexity"], rel=0.03)
            marked[cell["mark"]].add(at)
        for mark, width in (("best", BOUNDS["linewidth"]), ("level", BOUNDS["linewidth"] / 3)):
            frames = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_linewidth() == width]
            assert {(round(p.get_x() + 0.46), round(p.get_y() + 0.42)) for p in frames} == marked[mark]
    assert samples.texts_outside(figure) == []
    assert samples.overlaps(samples.tick_boxes(figure.axes[0].xaxis)) == 0
