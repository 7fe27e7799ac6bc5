"""Which text is tested against which."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.config.checks import problems_of
from lowrank.config.load import check_study, load_study
from lowrank.config.study import Study
from lowrank.config.tested import Pair, corpora_shown, pairs_of
from tests.config.wrong import changed

CONFIGS = Path(__file__).parents[3] / "config"


def test_the_pairs_of_a_study() -> None:
    tested = ("c4-test", "wikipedia-test", "speeches-test")
    places = {name: f"suites.held-out.corpora[{index}]" for index, name in enumerate(tested)}
    assert pairs_of(check_study(changed())) == [
        Pair(name, seen, (places[name],), (reader,))
        for name in sorted(tested)
        for seen, reader in (
            ("c4-calibration", "calibration.c4-32"),
            ("wikipedia-validation", "validation.wikipedia-top6"),
        )
    ]


def test_a_figure_of_predicted_losses_is_held_against_its_own_calibration() -> None:
    pairs = pairs_of(load_study(CONFIGS / "mini-paper.yaml"))
    ours = [pair for pair in pairs if "figures.predicted_loss.corpus" in pair.tested_at]
    assert [(pair.tested, pair.seen, pair.seen_at) for pair in ours] == [
        ("wikipedia-validation", "c4-calibration", ("calibration.c4-32",))
    ]


def test_what_no_table_or_figure_uses_is_not_compared() -> None:
    content = changed()
    before = pairs_of(check_study(content))
    content["calibration"]["unused"] = {"corpora": ["wikipedia-validation"], "windows": 2, "length": 64}
    content["suites"]["unused"] = {**content["suites"]["held-out"], "corpora": ["speeches-test"]}
    assert pairs_of(check_study(content)) == before


def test_places_of_equal_pairs_stand_together() -> None:
    content = changed()
    content["calibration"]["c4-8"] = {**content["calibration"]["c4-32"], "windows": 8}
    content["methods"]["lord"]["calibration"] = "c4-8"
    content["suites"]["shorter"] = {**content["suites"]["held-out"], "length": 64}
    content["tables"]["table_1"]["suites"].append("shorter")
    first = pairs_of(check_study(content))[0]
    assert first.tested_at == ("suites.held-out.corpora[0]", "suites.shorter.corpora[0]")
    assert first.seen_at == ("calibration.c4-32", "calibration.c4-8")


@pytest.mark.parametrize("name", ["quickstart", "mini-paper", "paper"])
def test_every_overlap_that_the_config_shows_is_a_pair(name: str) -> None:
    """If all corpora were one file, the check of the config would name these pairs, and no others."""
    study = load_study(CONFIGS / f"{name}.yaml")
    source = next(iter(study.corpora.values()))
    same = {corpus: source.model_copy(update={"documents": (0, None)}) for corpus in study.corpora}
    one_file: Study = study.model_copy(update={"corpora": same})
    told = {problem for problem in problems_of(one_file) if "shares documents with" in problem}
    for pair in pairs_of(study):
        named = [problem for problem in told if f"'{pair.tested}' shares documents with '{pair.seen}'" in problem]
        assert {problem.partition(": ")[0] for problem in named} == set(pair.tested_at), pair
        told -= set(named)
    assert not told


def test_tables_and_figures_that_show_tested_text() -> None:
    study = load_study(CONFIGS / "mini-paper.yaml")
    shown = {**study.tables, **study.figures}
    corpora = {"c4-test", "wikipedia-test", "speeches-test"}
    found = {name: corpora_shown(study, each) for name, each in shown.items()}
    assert found["table_1"] == found["differences"] == found["figure_3"] == found["figure_5"] == corpora
    assert found["predicted_loss"] == {"wikipedia-validation"}
    assert not found["table_7"] | found["figure_1"] | found["figure_6"] | found["agreement"] | found["arithmetic"]
