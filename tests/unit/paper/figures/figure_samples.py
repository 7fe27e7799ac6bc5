"""Made-up results for figures, and what tests look at in a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lowrank.config.outputs import Row
from lowrank.config.presets import Search
from lowrank.config.suites import PerplexitySuite
from lowrank.model.families import FAMILIES
from lowrank.paper.figures.search import Judge
from lowrank.paper.figures.style import style
from lowrank.paper.tables.data import RowResults

Json = dict[str, Any]
_SETTLED: WeakSet[Figure] = WeakSet()
SUITE = "held-out"
CORPORA = {"wikitext2-test": 1.0, "c4-validation": 1.4, "ptb-test": 4.0}  # corpus -> perplexity, times the level


def suite(corpora: int = 3) -> PerplexitySuite:
    return PerplexitySuite(kind="perplexity", corpora=list(CORPORA)[:corpora], length=2048)


def sensitivity(model: str, family: str, dense: float = 5.5, worst: float = 40.0, stderr: float | None = 0.1) -> Json:
    """Perplexities that rise from `dense` towards `worst`, for one type faster than for the others."""
    types = [linear.name for linear in FAMILIES[family].types]
    return {
        "kind": "sensitivity",
        "subject": {"model": model},
        "protocol": {"model": model, "corpus": "c4-search", "windows": 32, "length": 2048, "seed": 0},
        "dense": {"perplexity": dense, "stderr": stderr},
        "types": {
            name: [
                {
                    "kept": kept,
                    "perplexity": dense * (worst / dense) ** ((1 - kept) * (index + 1) / len(types)),
                    "stderr": stderr,
                    "removed": (1 - kept) / len(types),
                }
                for kept in (0.9, 0.7, 0.5, 0.3)
            ]
            for index, name in enumerate(types)
        },
    }


def compared(
    levels: Sequence[float], stderr: float | None = 0.02, place: str = "figures.f.rows[0]", **row: Any
) -> RowResults:
    """A row with one evaluation a level, that is, a seed; `stderr` is a share of the perplexity."""
    chosen = Row(**{"model": "llama-2-7b", "method": "bolaco", "ratio": 20, **row})
    subject = {key: getattr(chosen, key) for key in ("model", "method", "ratio", "tuning")}
    evaluations = [
        {
            "kind": "perplexity",
            "subject": subject | {"seed": seed},
            "corpora": {
                corpus: {
                    "perplexity": level * factor,
                    "stderr": None if stderr is None else level * factor * stderr,
                }
                for corpus, factor in CORPORA.items()
            },
        }
        for seed, level in enumerate(levels)
    ]
    manifests = [{"parameters": {"decoder_linears": 100 - chosen.ratio, "decoder_linears_dense": 100}} for _ in levels]
    return RowResults(row=chosen, evaluations={SUITE: evaluations}, manifests=manifests, place=place)


def dense(level: float = 5.5, model: str = "llama-2-7b") -> RowResults:
    return compared([level], model=model, method="dense", ratio=0)


def trials(
    seed: int = 0, count: int = 50, level: float = 10.0, uniform: float = 40.0, lord: float | None = 30.0
) -> pd.DataFrame:
    """A log of a search: the starts, five random allocations, then steps that come down to `level`."""
    generator = np.random.default_rng(seed)
    starts = [("uniform", uniform), *([("lord", lord)] if lord is not None else [])]
    records = []
    for index in range(count):
        if index < len(starts):
            origin, objective = starts[index]
        elif index < 5:
            origin, objective = "random", uniform * float(generator.uniform(0.8, 2.5))
        else:
            reached = level + (uniform - level) * 0.9 ** (index - 4)
            origin, objective = "improvement", reached * float(generator.uniform(0.97, 1.6))
        perplexity = objective * 0.8
        records.append(
            {
                "trial": index,
                "origin": origin,
                "perplexity": perplexity,
                "kl": (objective - perplexity) / 4.096,
                "objective": objective,
                "kept": 0.8,
                "qk/0": 0.5,
            }
        )
    return pd.DataFrame(records)


def judge(validation: str = "wiki-top", **search: Any) -> Judge:
    return Judge(validation, Search(**search))


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of the series with error bars of one panel."""
    found = {}
    for container in axes.containers:
        line = container[0]
        found[str(container.get_label())] = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
    return found


def looks(axes: Axes) -> dict[str, tuple[str, str, str]]:
    """Label -> colour, marker and dashes of the series with error bars of one panel."""
    lines = {str(container.get_label()): container[0] for container in axes.containers}
    return {
        name: (str(line.get_color()), str(line.get_marker()), str(line._unscaled_dash_pattern))
        for name, line in lines.items()
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def settle(figure: Figure) -> None:
    """Let the figure find its layout, as it does when it is saved; once, since it takes a while."""
    if figure not in _SETTLED:
        with style():
            figure.draw_without_rendering()
        _SETTLED.add(figure)


def texts(figure: Figure) -> list[Text]:
    """All texts that are seen; matplotlib keeps labels of ticks beyond an axis's ends, but does not draw them."""
    settle(figure)
    beyond = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in found if id(text) not in beyond]


def texts_outside(figure: Figure) -> list[str]:
    """Texts that the edge of the figure cuts off."""
    outside = []
    for text in texts(figure):
        box = text.get_window_extent()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            outside.append(text.get_text())
    return outside


def tick_boxes(axis: Axis) -> list[Bbox]:
    """Where the labels of an axis stand."""
    seen = {id(text) for text in texts(axis.get_figure(root=True))}
    return [label.get_window_extent() for label in axis.get_ticklabels() if id(label) in seen]


def overlaps(boxes: Sequence[Bbox]) -> int:
    """How many pairs of boxes overlap."""
    return sum(one.overlaps(two) for index, one in enumerate(boxes) for two in boxes[:index])
