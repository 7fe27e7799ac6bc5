"""The progress of searches: what is best so far, what may be compared, the starts, and logs that are no logs."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from snakemake.iocontainers import OutputFiles

from lowrank.config.outputs import (
    ComparisonFigure,
    PerplexityFigure,
    PredictedLossFigure,
    Row,
    SearchFigure,
    SensitivityFigure,
)
from lowrank.errors import RankwiseError
from lowrank.paper.figures.search import BEST, draw_search, objective_words, read_trials, search_frame
from tests.unit.paper.figures import figure_samples as samples
from tests.unit.paper.figures.figure_samples import judge, trials
from tests.unit.paper.figures.test_predicted_loss import truncations

SCRIPTS = Path(__file__).parents[4] / "workflow_scripts"


def log_of(objectives: list[float], perplexities: list[float] | None = None) -> pd.DataFrame:
    """A log with these objectives; the first trial is the uniform allocation, the second LoRD's."""
    origins = ["uniform", "lord", *["improvement"] * len(objectives)][: len(objectives)]
    return pd.DataFrame(
        {
            "trial": range(len(objectives)),
            "origin": origins,
            "perplexity": perplexities or objectives,
            "kl": 0.1,
            "objective": objectives,
            "kept": 0.8,
        }
    )


def best_of(frame: pd.DataFrame, method: str = "a", column: str = "mean") -> list[float]:
    return list(frame[(frame["series"] == BEST) & (frame["method"] == method)][column])


def drawn(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def draw(frame: pd.DataFrame, smoke: bool = False) -> Figure:
    return draw_search(frame, "Progress of the search", smoke)


def test_the_best_so_far_is_averaged_over_seeds() -> None:
    logs = [log_of([9.0, 10.0, 6.0, 7.0]), log_of([9.0, 8.0, 7.0, 3.0])]
    frame = search_frame({"a": {"20": logs}}, {"a": judge()})
    assert best_of(frame) == [9.0, 8.5, 6.5, 4.5]
    assert best_of(frame, column="lowest") == [9.0, 8.0, 6.0, 3.0]
    assert best_of(frame, column="highest") == [9.0, 9.0, 7.0, 6.0]
    assert best_of(frame, column="evaluation") == [1, 2, 3, 4]
    starts = frame[frame["series"] != BEST].set_index("series")
    assert dict(starts["mean"]) == {"uniform": 9.0, "lord": 9.0}
    assert dict(starts["evaluation"]) == {"uniform": 1, "lord": 2}
    assert set(frame["quantity"]) == {"objective"}
    assert set(frame["seeds"]) == {2}


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=30))
def test_the_best_never_rises_and_ends_at_the_smallest(objectives: list[float]) -> None:
    best = best_of(search_frame({"a": {"20": [log_of(objectives)]}}, {"a": judge()}))
    assert best == [min(objectives[: count + 1]) for count in range(len(objectives))]


def test_allocations_that_broke_the_model_are_never_the_best_and_no_start() -> None:
    logs = [log_of([math.inf, 10.0, math.inf, 7.0]), log_of([9.0, math.inf, 7.0, 3.0])]
    frame = search_frame({"a": {"20": logs}}, {"a": judge()})
    assert best_of(frame, column="evaluation") == [2, 3, 4]
    assert best_of(frame) == [9.5, 8.5, 5.0]
    assert set(frame["series"]) == {BEST}, "each start broke the model of one seed"
    draw(frame)


def test_methods_with_other_objectives_are_compared_by_perplexity_of_their_own_best() -> None:
    logs = {"20": [log_of([9.0, 8.0, 10.0], perplexities=[5.0, 7.0, 1.0])]}
    judges = {"a": judge(), "b": judge(kl_direction="forward")}
    frame = search_frame({"a": logs, "b": logs}, judges)
    assert set(frame["quantity"]) == {"perplexity"}
    assert best_of(frame) == [5.0, 7.0, 7.0]  # of the trial with the smallest objective, not the smallest perplexity
    figure = draw(frame)
    assert figure.axes[0].get_ylabel() == "perplexity of the best so far"
    assert "objectives differ" in figure.legends[0].get_title().get_text()


def test_an_objective_without_weight_is_perplexity_whatever_its_direction() -> None:
    logs = {"20": [log_of([9.0, 8.0])]}
    judges = {"a": judge(kl_weight=0), "b": judge(kl_weight=0, kl_direction="forward", kl_reduction="sequence")}
    frame = search_frame({"a": logs, "b": logs}, judges)
    assert set(frame["objective"]) == {"perplexity"}
    assert set(frame["quantity"]) == {"objective"}
    assert draw(frame).axes[0].get_ylabel() == "perplexity of the best so far"


@pytest.mark.parametrize("change", [{"kl_weight": 1.0}, {"kl_direction": "forward"}, {"kl_reduction": "sequence"}])
def test_every_part_of_the_objective_decides_whether_it_is_compared(change: dict[str, Any]) -> None:
    logs = {"20": [log_of([9.0, 8.0])]}
    assert set(search_frame({"a": logs, "b": logs}, {"a": judge(), "b": judge()})["quantity"]) == {"objective"}
    different = search_frame({"a": logs, "b": logs}, {"a": judge(), "b": judge(**change)})
    assert set(different["quantity"]) == {"perplexity"}


def test_objectives_are_written_as_formulas() -> None:
    assert objective_words(judge()) == "perplexity + 4.096 KL(compressed ‖ dense) per token"
    other = judge(kl_weight=0.001, kl_direction="forward", kl_reduction="sequence")
    assert objective_words(other) == "perplexity + 0.001 KL(dense ‖ compressed) per sequence"


def test_a_panel_a_ratio_a_line_a_method_and_the_numbers_of_the_frame() -> None:
    data = {name: {str(ratio): [trials(seed, level=ratio)] for ratio in (30, 20)} for seed, name in enumerate("ab")}
    frame = search_frame(data, {"a": judge(), "b": judge()})
    figure = draw(frame)
    assert [axes.get_title() for axes in figure.axes] == ["20 % removed", "30 % removed"]
    for axes, ratio in zip(figure.axes, (20, 30), strict=True):
        part = frame[frame["removed_percent"] == ratio]
        for method in "ab":
            expected = list(zip(range(1, 51), best_of(part, method), strict=True))
            assert drawn(axes, method) == expected
        assert {y for _, y in drawn(axes, "uniform allocation")} == {40.0}
        assert {y for _, y in drawn(axes, "LoRD's allocation")} == {30.0}
        assert len(axes.collections) == 0  # one seed has no band
    assert samples.legend(figure) == ["a", "b", "uniform allocation", "LoRD's allocation"]


def test_several_seeds_have_a_band_from_the_lowest_to_the_highest() -> None:
    frame = search_frame({"a": {"20": [log_of([9.0, 6.0, 6.0]), log_of([9.0, 8.0, 2.0])]}}, {"a": judge()})
    (axes,) = draw(frame).axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (2.0, 9.0)
    assert drawn(axes, "a")[-1] == (3, 4.0)


def test_other_windows_get_panels_of_their_own() -> None:
    data = {name: {"20": [trials(seed)]} for seed, name in enumerate("abc")}
    judges = {"a": judge("wiki"), "b": judge("c4"), "c": judge("wiki")}
    figure = draw(search_frame(data, judges))
    assert [axes.get_title() for axes in figure.axes] == ["20 % removed\nwindows: wiki", "20 % removed\nwindows: c4"]
    lines = [{line.get_label() for line in axes.lines} & set("abc") for axes in figure.axes]
    assert lines == [{"a", "c"}, {"b"}]
    assert samples.legend(figure)[:3] == ["a", "b", "c"]


def test_a_start_that_differs_from_method_to_method_is_a_mark_and_no_line() -> None:
    data = {"a": {"20": [trials(uniform=40.0)]}, "b": {"20": [trials(uniform=44.0)]}}
    figure = draw(search_frame(data, {"a": judge(), "b": judge()}))
    (axes,) = figure.axes
    marks = [line for line in axes.lines if line.get_marker() == "h" and len(line.get_xdata())]
    assert [float(line.get_ydata()[0]) for line in marks] == [40.0, 44.0]
    assert samples.legend(figure) == ["a", "b", "uniform allocation, by method", "LoRD's allocation"]


def test_a_transferred_allocation_is_a_start_of_the_method_that_has_it() -> None:
    transferred = log_of([5.0, 9.0, 4.0]).assign(origin=["transfer", "uniform", "improvement"])
    frame = search_frame(
        {"a": {"20": [log_of([9.0, 8.0, 7.0])]}, "b": {"20": [transferred]}}, dict.fromkeys("ab", judge())
    )
    (axes,) = draw(frame).axes
    assert {y for _, y in drawn(axes, "transferred allocation")} == {5.0}
    assert {y for _, y in drawn(axes, "uniform allocation")} == {9.0}


def test_a_search_without_lord_has_no_line_of_it() -> None:
    figure = draw(search_frame({"a": {"20": [trials(lord=None)]}}, {"a": judge()}))
    assert samples.legend(figure) == ["a", "uniform allocation"]


@pytest.mark.parametrize(
    ("methods", "top", "ratios", "seeds"),
    [(1, 40.0, [20], 1), (1, 3e7, [10, 20, 30], 3), (8, 40.0, [10, 20, 30], 1), (8, 3e7, [20], 3)],
)
def test_figures_of_every_size_are_readable(methods: int, top: float, ratios: list[int], seeds: int) -> None:
    methods_of = [f"a-search-with-a-long-name-{index}" for index in range(methods)]
    logs = [[trials(10 * index + seed, uniform=top, level=6.0) for seed in range(seeds)] for index in range(methods)]
    data = {name: {str(ratio): logs[index] for ratio in ratios} for index, name in enumerate(methods_of)}
    figure = draw(search_frame(data, {name: judge() for name in methods_of}), smoke=True)
    assert figure.get_suptitle().endswith("smoke run, not a measurement")
    assert samples.texts_outside(figure) == []
    assert min(text.get_fontsize() for text in samples.texts(figure)) >= 7
    assert samples.legend(figure)[:methods] == methods_of
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        assert samples.overlaps(samples.tick_boxes(axes.yaxis)) == 0
        assert samples.overlaps(samples.tick_boxes(axes.xaxis)) == 0
        styles = {(line.get_color(), line.get_marker()) for line in axes.lines if line.get_label() in methods_of}
        assert len(styles) == methods


def test_few_evaluations_are_counted_in_whole_numbers() -> None:
    figure = draw(search_frame({"a": {"20": [log_of([9.0, 8.0, 7.0])]}}, {"a": judge()}))
    samples.settle(figure)
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_methods_without_a_search_and_seeds_of_unequal_length_are_refused() -> None:
    with pytest.raises(RankwiseError, match="'lord' does not search its ranks"):
        search_frame({"lord": {"20": [trials()]}}, {})
    with pytest.raises(RankwiseError, match="searches of 'a' at 20 % have 50, 49 trials"):
        search_frame({"a": {"20": [trials(), trials(count=49)]}}, {"a": judge()})


def written(folder: Path, log: pd.DataFrame) -> Path:
    path = folder / "trials.csv"
    log.to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    "log",
    [
        trials(),
        trials().assign(kl=float("nan")),  # without a divergence
        trials().assign(objective=lambda log: log["objective"].where(log["trial"] == 3, math.inf)),
    ],
)
def test_a_log_is_read_as_it_was_written(log: pd.DataFrame, tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(read_trials(written(tmp_path, log)), log)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: log.drop(columns="objective"), "no column objective"),
        (lambda log: log.iloc[:0], "trials are missing"),
        (lambda log: log.iloc[[0, 2]], "trials are missing, or not in order"),
        (lambda log: log.assign(objective=float("inf")), "no positive number"),
        (lambda log: log.assign(perplexity="n/a"), "no positive number"),
        (lambda log: log.assign(objective=-1.0), "no positive number"),
    ],
)
def test_logs_that_no_search_writes_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = written(tmp_path, change(trials()))
    with pytest.raises(RankwiseError, match=words) as caught:
        read_trials(path)
    assert str(caught.value).startswith(str(path))


def test_missing_and_empty_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"none\.csv: missing"):
        read_trials(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(RankwiseError, match=r"empty\.csv: cannot be read"):
        read_trials(tmp_path / "empty.csv")


# --- the stage, from files to files ---


def stored(folder: Path, content: Any) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def stage_settings(kind: str, folder: Path) -> dict[str, Any]:
    evaluation = stored(folder, samples.compared([7.0]).evaluations[samples.SUITE][0])
    suite = samples.suite(1).plain()
    row = Row(model="llama-2-7b", method="bolaco", ratio=20)
    manifest = stored(folder, {"parameters": {"decoder_linears": 80, "decoder_linears_dense": 100}})
    found = {"evaluations": [evaluation], "manifests": [manifest]}
    if kind == "sensitivity":
        studies = [samples.sensitivity("llama-2-7b", "llama"), samples.sensitivity("opt-6.7b", "opt")]
        figure: Any = SensitivityFigure(kind="sensitivity", title="T", sensitivity=["one", "two"])
        return {"figure": figure.plain(), "results": {"sensitivity": [stored(folder, study) for study in studies]}}
    if kind == "perplexity":
        figure = PerplexityFigure(
            kind=kind, title="T", model="llama-2-7b", suite=samples.SUITE, methods=["bolaco"], ratios=[20]
        )
        results = {"suite": suite, "dense": [evaluation], "curves": {"bolaco": {"20": found}}}
        return {"figure": figure.plain(), "results": results, "vocabulary": 32_000}
    if kind == "comparison":
        figure = ComparisonFigure(kind=kind, title="T", suite=samples.SUITE, rows=[row])
        results = {"suite": suite, "rows": [{"row": row.plain()} | found]}
        return {"figure": figure.plain(), "results": results}
    if kind == "predicted-loss":
        figure = PredictedLossFigure(
            kind=kind, title="T", model="m", calibration="c", covariance=["one", "two"], corpus="d", windows=2, length=8
        )
        measured = {name: stored(folder, truncations(seed=seed)) for seed, name in enumerate(figure.covariance)}
        return {"figure": figure.plain(), "results": {"truncations": measured}}
    figure = SearchFigure(kind="search", title="T", model="m", methods=["bolaco"], ratios=[20])
    return {
        "figure": figure.plain(),
        "results": {"trials": {"bolaco": {"20": [str(written(folder, trials()))]}}},
        "judges": {"bolaco": {"validation": "wiki", "search": judge().search.plain()}},
    }


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("sensitivity", 2 + 4 * 13),
        ("perplexity", 2),
        ("comparison", 1),
        ("predicted-loss", 2 * 4 * 7),
        ("search", 50 + 2),
    ],
)
def test_the_stage_writes_three_files_of_every_kind(kind: str, lines: int, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    settings = stage_settings(kind, results) | {"name": "figure_1", "smoke": True}
    output = OutputFiles(fromdict={suffix: str(tmp_path / f"figure_1.{suffix}") for suffix in ("pdf", "png", "csv")})
    job = SimpleNamespace(
        params=SimpleNamespace(settings=settings), output=output, log=[], threads=1, resources={}, rule="draw_figure"
    )
    runpy.run_path(str(SCRIPTS / "stages/draw_figure.py"), init_globals={"snakemake": job})
    assert Path(output.pdf).read_bytes().startswith(b"%PDF")
    assert Path(output.png).read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(output.csv)) == lines
