"""The report in a browser: it fits wide and narrow windows and paper, stands alone, and its leader board works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apt import Unavailable
from tests.browser import Page, browser, check_page
from tests.unit.paper.report_samples import render_sample


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_sample(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    try:
        with browser(tmp_path_factory.mktemp("profile")) as opened:
            yield opened
    except Unavailable as error:
        pytest.skip(str(error))


def test_the_page_fits_every_window_and_paper_and_stands_alone(page: Page, report: Path) -> None:
    check_page(page, report)


@pytest.mark.parametrize("width", [700, 1200, 1280, 1600])
def test_the_tables_of_what_came_out_do_not_run_into_each_other(page: Page, report: Path, width: int) -> None:
    page.open(report, width)
    beyond = "t => t.getBoundingClientRect().right - t.closest('article').getBoundingClientRect().right"
    assert max(page.evaluate(f"[...document.querySelectorAll('.verdicts table')].map({beyond})")) <= 0


def test_what_is_bought_is_told_apart_from_what_it_costs(page: Page, report: Path) -> None:
    page.open(report, 1280)
    told = page.evaluate("[...document.querySelectorAll('.verdicts p')].map(p => p.innerHTML.replace(/\\s+/g, ' '))")
    assert told[0].startswith("What lord buys: weights in memory 4.6 MiB → 3.8 MiB (<strong>−17 %</strong>), tokens/s")
    assert told[0].endswith("(× 1.08).")
    assert told[1] == "What lord costs: tokens/s generated 12.5 → 11.0 (× 0.88)."


def test_text_can_be_read_on_light_and_dark(page: Page, report: Path) -> None:
    """The luminance of the page, and the contrast of its text by WCAG 2."""
    channels = "c => getComputedStyle(document.body)[c].match(/[0-9.]+/g).slice(0, 3).map(Number)"
    for dark in (False, True):
        page.open(report, 1280, dark)
        ink, paper = (_luminance(page.evaluate(f"({channels})('{name}')")) for name in ("color", "backgroundColor"))
        assert (paper < ink) == dark
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7


def _luminance(channels: list[float]) -> float:
    linear = [c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


SHOWN = "[...document.querySelectorAll('#board-table tbody tr')].filter(l => !l.hidden).map(l => l.dataset.method)"


def click(page: Page, heading: str) -> None:
    page.evaluate(
        f"[...document.querySelectorAll('#board-table th button')].find(b => b.innerText == '{heading}').click()"
    )


def test_the_leader_board_sorts_and_filters(page: Page, report: Path) -> None:
    page.open(report, 1280)
    everything = page.evaluate(SHOWN)
    click(page, "ppl wiki_test")
    assert page.evaluate(SHOWN) == ["dense", "lord", "lord + scales", "svd", "svd"]
    click(page, "ppl wiki_test")
    assert page.evaluate(SHOWN) == ["svd", "svd", "lord + scales", "lord", "dense"]
    click(page, "weights")
    assert page.evaluate(SHOWN)[-1] == "lord + scales", "what was not measured stands last"
    choose = "(f, v) => { const c = document.querySelector(`[data-filter=${f}]`); c.value = v;"
    choose += " c.dispatchEvent(new Event('input')); }"
    page.evaluate(f"({choose})('ratio', '20')")
    assert sorted(page.evaluate(SHOWN)) == ["lord", "lord + scales", "svd"]
    page.evaluate(f"({choose})('method', 'SCALES')")
    assert page.evaluate(SHOWN) == ["lord + scales"]
    assert page.evaluate("document.getElementById('board-count').value") == f"1 of {len(everything)}"


def test_methods_stay_in_sight_while_a_table_scrolls(page: Page, report: Path) -> None:
    page.open(report, 390)
    place = "document.querySelector('#table_1 tbody tr:last-child .fixed').getBoundingClientRect().left"
    page.evaluate("document.querySelector('#table_1 .scroll').scrollLeft = 400")
    assert 0 <= page.evaluate(place) < 40


def test_without_scripts_all_rows_are_there_and_no_control_that_does_nothing(page: Page, report: Path) -> None:
    page.open(report, 1280, script=False)
    assert len(page.evaluate(SHOWN)) == 5
    assert page.evaluate("document.getElementById('board-filters').getClientRects().length") == 0
