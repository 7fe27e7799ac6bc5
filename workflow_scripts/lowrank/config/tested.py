"""Which text is tested against which: no number is reported on text that calibration or validation saw.

Sensitivities are no test: they measure on what their config names, validation text as a rule, and say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank.config.outputs import ComparisonFigure, Figure, PerplexityFigure, PredictedLossFigure, Table
from lowrank.config.study import Study
from lowrank.config.suites import PerplexitySuite
from lowrank.config.used import used_study


@dataclass(frozen=True)
class Pair:
    """Two corpora that may have no text in common.

    Attributes:
        tested: the corpus that a table or figure reports a number of.
        seen: the corpus that calibration or validation reads.
        tested_at, seen_at: the YAML paths that say so.
    """

    tested: str
    seen: str
    tested_at: tuple[str, ...]
    seen_at: tuple[str, ...]


def pairs_of(study: Study) -> list[Pair]:
    """All pairs of a study's tables and figures; presets that these do not use are no part of it.

    As in the check of the config, the text of a suite is held against every calibration and validation, whichever row
    used it, and the text of a figure of predicted losses against the calibration of that figure.
    """
    used = used_study(study)
    found: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for tested_at, tested, seen_at, seen in _uses(used):
        tests, readers = found.setdefault((tested, seen), (set(), set()))
        tests.add(tested_at)
        readers.add(seen_at)
    return [
        Pair(tested, seen, tuple(sorted(tests)), tuple(sorted(readers)))
        for (tested, seen), (tests, readers) in sorted(found.items())
    ]


def corpora_shown(study: Study, shown: Table | Figure) -> set[str]:
    """The corpora whose losses or perplexities a table or figure shows."""
    if isinstance(shown, PredictedLossFigure):
        return {shown.corpus}
    suites = [shown.suite] if isinstance(shown, PerplexityFigure | ComparisonFigure) else getattr(shown, "suites", [])
    judges = [study.suites[name] for name in suites]
    return {corpus for judge in judges if isinstance(judge, PerplexitySuite) for corpus in judge.corpora}


def _uses(used: Study) -> Iterator[tuple[str, str, str, str]]:
    """(place, corpus) of a test, and (place, corpus) of what it is held against."""
    readers = [(f"calibration.{name}", preset.corpora) for name, preset in used.calibration.items()]
    readers += [(f"validation.{name}", preset.corpora) for name, preset in used.validation.items()]
    for name, suite in used.suites.items():
        for index, tested in enumerate(suite.corpora if isinstance(suite, PerplexitySuite) else []):
            for place, corpora in readers:
                yield from ((f"suites.{name}.corpora[{index}]", tested, place, seen) for seen in corpora)
    for name, figure in used.figures.items():
        if isinstance(figure, PredictedLossFigure):
            for seen in used.calibration[figure.calibration].corpora:
                yield f"figures.{name}.corpus", figure.corpus, f"calibration.{figure.calibration}", seen
