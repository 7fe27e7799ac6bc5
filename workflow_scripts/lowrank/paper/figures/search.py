"""How fast the search gets better: a line a method, a panel a ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowrank.config.presets import Search
from lowrank.errors import RankwiseError
from lowrank.paper.figures.axes import TICKS_UP, is_wide, readable_ticks, scale_words
from lowrank.paper.figures.panels import columns_for, label_axes, legend_below, legend_entries, panel_grid, write_title
from lowrank.paper.figures.style import line_style, method_looks, style

Quantity = Literal["objective", "perplexity"]
COLUMNS = ("trial", "origin", "perplexity", "kl", "objective", "kept")
BEST = "best so far"
# Origin of a trial -> its name in the legend.
STARTS = {
    "uniform": "uniform allocation",
    "lord": "LoRD's allocation",
    "transfer": "transferred allocation",
    "predicted": "ranks by predicted loss",
}
START_DASHES: dict[str, Any] = {
    "uniform": (0, (6, 2)),
    "lord": (0, (1, 1.2)),
    "transfer": (0, (4, 1.5, 1, 1.5)),
    "predicted": (0, (3, 3)),
}
START_MARKERS = {"uniform": "h", "lord": "*", "transfer": "d", "predicted": "P"}
START_COLOUR = "#444444"
SAME = 0.01  # starts that differ by less than this share are one line: it is wider than their distance
MARKS = 8  # on a line
PANEL_HEIGHT = 2.4  # inches


@dataclass(frozen=True)
class Judge:
    """What a method's search is judged by.

    Attributes:
        validation: the preset of the windows; what was measured on others cannot be compared.
        search: the preset of the search, of which the objective's weight, direction and reduction matter here.
    """

    validation: str
    search: Search

    @property
    def objective(self) -> tuple[float, str, str]:
        """What makes objectives comparable; without a weight, the divergence does not matter."""
        search = self.search
        return (search.kl_weight, search.kl_direction, search.kl_reduction) if search.kl_weight else (0.0, "", "")


def read_trials(path: Path) -> pd.DataFrame:
    """The log of a search, `trials.csv`; the numbers of allocations that break the model are infinite.

    Raises:
        RankwiseError: it is missing, empty, damaged, or holds numbers that no search writes.
    """
    cure = "Delete the folder and run the workflow again."
    try:
        trials = pd.read_csv(path)
    except FileNotFoundError as error:
        raise RankwiseError(f"{path}: missing. Run the workflow again: it makes what is missing.") from error
    except (OSError, ValueError) as error:  # pandas's own errors are ValueErrors
        raise RankwiseError(f"{path}: cannot be read as a log of trials ({error}). {cure}") from error
    if missing := [name for name in COLUMNS if name not in trials]:
        raise RankwiseError(f"{path}: no log of trials, it has no column {', '.join(missing)}. {cure}")
    numbers = trials[["perplexity", "objective"]].apply(pd.to_numeric, errors="coerce")
    if trials.empty or list(trials["trial"]) != list(range(len(trials))):
        raise RankwiseError(f"{path}: trials are missing, or not in order. {cure}")
    if not (numbers > 0).all(axis=None) or not np.isfinite(numbers).all(axis=1).any():
        raise RankwiseError(f"{path}: a perplexity or an objective is no positive number. {cure}")
    return trials.assign(**numbers)


def search_frame(
    trials: Mapping[str, Mapping[str, Sequence[pd.DataFrame]]], judges: Mapping[str, Judge]
) -> pd.DataFrame:
    """What is drawn: for each method and ratio, the best after each evaluation, and the allocations it began with.

    Objectives of different kinds cannot be compared. Where the methods' objectives differ, the quantity is the
    perplexity of the allocation that is best by the method's own objective; it need not fall with every improvement.

    Args:
        trials: method -> removed percent -> logs of the search, one a seed.
        judges: method -> what it is judged by.

    Returns:
        Columns: validation, objective (in words), removed_percent, method, series (`best so far`, or the origin of
        a start), evaluation (from 1), quantity, mean, lowest and highest over seeds, seeds.

    Raises:
        RankwiseError: a method has no judge, or its seeds have different numbers of trials.
    """
    if unknown := [method for method in trials if method not in judges]:
        raise RankwiseError(f"'{unknown[0]}' does not search its ranks; take it out of the figure's `methods`.")
    quantity = quantity_of([judges[method] for method in trials])
    records = []
    for method, curves in trials.items():
        judge = judges[method]
        about = {"validation": judge.validation, "objective": objective_words(judge)}
        for ratio, logs in curves.items():
            if len({len(log) for log in logs}) != 1:
                raise RankwiseError(
                    f"the searches of '{method}' at {ratio} % have {_listed(len(log) for log in logs)} trials, "
                    "one number a seed; delete the shorter ones and run the workflow again."
                )
            place = about | {"removed_percent": int(ratio), "method": method}
            records += [place | record for record in _records(logs, quantity)]
    return pd.DataFrame(records)


def quantity_of(judges: Sequence[Judge]) -> Quantity:
    """What the methods can be compared by."""
    return "objective" if len({judge.objective for judge in judges}) == 1 else "perplexity"


def objective_words(judge: Judge) -> str:
    """The objective of a search as a formula."""
    weight, direction, reduction = judge.objective
    if not weight:
        return "perplexity"
    of = "compressed ‖ dense" if direction == "reverse" else "dense ‖ compressed"
    return f"perplexity + {weight:g} KL({of}) per {reduction}"


def draw_search(frame: pd.DataFrame, title: str, smoke: bool = False) -> Figure:
    """Draw the frame of `search_frame`: a panel a ratio, and a row of panels each set of validation windows.

    Lines are means over seeds in a band from the lowest to the highest. An allocation that all methods of a panel
    begin with is a horizontal line; where its value differs from method to method, it is a mark in their colours.
    """
    places = frame[["validation", "removed_percent"]].drop_duplicates()
    ratios, validations = sorted(set(places["removed_percent"])), list(dict.fromkeys(places["validation"]))
    several = len(validations) > 1
    cells = [(validation, ratio) for validation in validations for ratio in ratios]
    looks = {method: line_style(number) for method, number in method_looks(map(str, frame["method"])).items()}
    wide = any(
        is_wide([*part["lowest"], *part["highest"]]) for _, part in frame.groupby(["validation", "removed_percent"])
    )
    with style():
        columns = len(ratios) if several else columns_for(len(ratios))
        figure, panels = panel_grid(len(cells), PANEL_HEIGHT, columns)
        for axes, (validation, ratio) in zip(panels, cells, strict=True):
            chosen = (frame["validation"] == validation) & (frame["removed_percent"] == ratio)
            _draw_panel(axes, frame[chosen], looks, wide)
            axes.set_title(f"{ratio} % removed" + (f"\nwindows: {validation}" if several else ""))
        label_axes(panels, "allocations evaluated", _value_label(frame) + scale_words(wide))
        write_title(figure, title, smoke)
        found = legend_entries(panels)
        starts = [name for name in found if name not in looks]
        legend_below(figure, {name: found[name] for name in [*looks, *starts]}, _notes(frame))
    return figure


def _records(logs: Sequence[pd.DataFrame], quantity: Quantity) -> list[dict[str, Any]]:
    """The best after each evaluation, and the starts, each over seeds."""
    best = np.stack([_best_so_far(log, quantity) for log in logs])
    finite = np.isfinite(best).all(axis=0)  # a line begins once every seed has an allocation that works
    records = [_record(BEST, index, quantity, best[:, index]) for index in range(best.shape[1]) if finite[index]]
    for origin in STARTS:
        found = [log[log["origin"] == origin].head(1) for log in logs]
        if all(len(row) for row in found):
            values = np.array([float(row[quantity].iloc[0]) for row in found])
            if np.isfinite(values).all():
                records.append(_record(origin, int(found[0]["trial"].iloc[0]), quantity, values))
    return records


def _best_so_far(log: pd.DataFrame, quantity: Quantity) -> np.ndarray:
    """The quantity of the allocation with the smallest objective after each evaluation (the first of equals)."""
    objective, values = log["objective"].to_numpy(), log[quantity].to_numpy(dtype=float)
    leaders = [int(objective[: count + 1].argmin()) for count in range(len(log))]
    best: np.ndarray = values[leaders]
    return best


def _record(series: str, trial: int, quantity: Quantity, values: np.ndarray) -> dict[str, Any]:
    return {
        "series": series,
        "evaluation": trial + 1,
        "quantity": quantity,
        "mean": float(values.mean()),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "seeds": len(values),
    }


def _draw_panel(axes: Axes, frame: pd.DataFrame, looks: Mapping[str, dict[str, Any]], wide: bool) -> None:
    if wide:
        axes.set_yscale("log")
    best = frame[frame["series"] == BEST]
    for index, (method, points) in enumerate(best.groupby("method", sort=False)):
        look = looks[str(method)]
        every = max(1, len(points) // MARKS)
        axes.plot(
            points["evaluation"],
            points["mean"],
            drawstyle="steps-mid",
            label=str(method),
            markevery=(index % every, every),  # marks of methods that run together stand side by side
            **look,
        )
        if (points["seeds"] > 1).any():
            ends = points["lowest"], points["highest"]
            axes.fill_between(
                points["evaluation"], *ends, step="mid", color=look["color"], alpha=0.15, linewidth=0, zorder=1
            )
    for origin in STARTS:
        _draw_start(axes, frame[frame["series"] == origin], origin, looks)
    readable_ticks(axes.yaxis, TICKS_UP)
    axes.set_xlim(0, best["evaluation"].max() + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_start(axes: Axes, starts: pd.DataFrame, origin: str, looks: Mapping[str, dict[str, Any]]) -> None:
    if starts.empty:
        return
    if starts["mean"].max() <= starts["mean"].min() * (1 + SAME):
        axes.axhline(
            starts["mean"].mean(),
            color=START_COLOUR,
            linestyle=START_DASHES[origin],
            linewidth=0.9,
            zorder=1.5,
            label=STARTS[origin],
        )
        return
    look: dict[str, Any] = {
        "marker": START_MARKERS[origin],
        "linestyle": "none",
        "markerfacecolor": "white",
        "markersize": 6,
    }
    for start in starts.to_dict(orient="records"):
        colour = looks[start["method"]]["color"]
        axes.plot(start["evaluation"], start["mean"], markeredgecolor=colour, zorder=3, **look)
    axes.plot([], [], markeredgecolor=START_COLOUR, label=f"{STARTS[origin]}, by method", **look)


def _value_label(frame: pd.DataFrame) -> str:
    (quantity,) = set(frame["quantity"])
    if quantity == "objective" and set(frame["objective"]) != {"perplexity"}:
        return "best objective so far"
    return "perplexity of the best so far"


def _notes(frame: pd.DataFrame) -> list[str]:
    (quantity,) = set(frame["quantity"])
    if quantity == "perplexity":
        notes = ["objectives differ: each line is the perplexity of what is best by the method's own"]
    else:
        formula = str(frame["objective"].iloc[0])
        # Spaces that do not break keep the divergence in one line.
        notes = ["objective: " + " + ".join(term.replace(" ", "\u00a0") for term in formula.split(" + "))]
    if (seeds := frame["seeds"].max()) > 1:
        notes.append(f"lines: means over {seeds} seeds, bands: lowest to highest")
    return notes


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
