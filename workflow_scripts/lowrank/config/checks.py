"""Checks between sections: names that lead nowhere, rows that make no sense, text seen twice, budgets out of reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lowrank.config.base import Section
from lowrank.config.fit import problems_of_fit
from lowrank.config.messages import suggestion
from lowrank.config.outputs import ComparisonFigure, PredictedLossFigure, Row, SearchFigure, Table, namesakes
from lowrank.config.presets import MethodSettings
from lowrank.config.references import references
from lowrank.config.renaming import with_name
from lowrank.config.sources import RandomSource
from lowrank.config.study import Study
from lowrank.config.suites import METRICS, CostSuite, GenerationSuite, PerplexitySuite, ZeroShotSuite


def problems_of(
    study: Study,
    elsewhere: frozenset[tuple[str, str]] = frozenset(),
    offered: frozenset[tuple[str, str]] = frozenset(),
) -> list[str]:
    """All inconsistencies between sections, each with its YAML path, reason and cure.

    Args:
        study: sections that are sound each by itself.
        elsewhere: further (section, name) that exist, although they could not be read.
        offered: those of a file of presets, which may be meant where a name is wrong.
    """
    return [*_unknown_names(study, elsewhere, offered), *_misuses(study), *problems_of_fit(study)]


def _misuses(study: Study) -> Iterator[str]:
    """What is wrong between entries, whatever the models' shapes; unknown names are passed over."""
    yield from _dense_and_ratio(study)
    yield from _own_tokenizers(study)
    yield from _table_suites(study)
    yield from _limits(study)
    yield from _tasks(study)
    yield from _overlaps(study)
    yield from _covariance_groups(study)
    yield from _transfers(study)
    yield from _predicted_losses(study)
    yield from _identity_blocks(study)


def _unknown_names(
    study: Study, elsewhere: frozenset[tuple[str, str]], offered: frozenset[tuple[str, str]]
) -> Iterator[str]:
    for place, section, name in references(study):
        known = getattr(study, section)
        if name not in known and (section, name) not in elsewhere:
            choices = {*known, *(preset for part, preset in offered if part == section)}
            yield f"{place}: '{name}' is not in `{section}`{_offer(study, place, name, sorted(choices))}"


def _offer(study: Study, place: str, name: str, known: Iterable[str]) -> str:
    """The names that may stand at a place, or the nearest of them: those that make nothing else wrong."""
    before = set(_misuses(study))
    tried = {other: with_name(study, place, other) for other in known}
    fitting = [other for other, renamed in tried.items() if renamed and before.issuperset(_misuses(renamed))]
    return suggestion(name, fitting) if fitting or not tried else ", and nothing else there fits here"


def _own_tokenizers(study: Study) -> Iterator[str]:
    for name, model in study.models.items():
        if isinstance(model.source, RandomSource) and model.source.tokenizer == name:
            yield f"models.{name}.source.tokenizer: '{name}' has no tokenizer of its own; name another model"


def _rows(study: Study) -> Iterator[tuple[str, Row]]:
    for name, table in study.tables.items():
        for index, row in enumerate(table.rows):
            yield f"tables.{name}.rows[{index}]", row
    for name, figure in study.figures.items():
        if isinstance(figure, ComparisonFigure):
            for index, row in enumerate(figure.rows):
                yield f"figures.{name}.rows[{index}]", row


def _dense_and_ratio(study: Study) -> Iterator[str]:
    if "none" in study.tuning:
        yield "tuning.none: the name 'none' means no post-training; choose another"
    for place, row in _rows(study):
        if row.method not in study.methods:
            continue
        dense = study.method(row.method).kind == "dense"
        if dense and row.ratio:
            yield f"{place}.ratio: {row.ratio} on a dense row; write 0 or leave it out"
        if not dense and not row.ratio:
            yield f"{place}.ratio: 0 or missing; write how many percent '{row.method}' is to remove, 1 to 90"
        if dense and row.tuning != "none":
            yield f"{place}.tuning: post-training heals what compression did, and this row is dense"
    for name, figure in study.figures.items():
        for index, method in enumerate(getattr(figure, "methods", [])):
            if method not in study.methods:
                continue
            if study.method(method).kind == "dense":
                yield f"figures.{name}.methods[{index}]: '{method}' is dense and drawn anyway; leave it out"
            elif isinstance(figure, SearchFigure) and study.method(method).search is None:
                yield f"figures.{name}.methods[{index}]: '{method}' has no search whose progress could be drawn"


def _without_dense(study: Study, place: str, rows: Sequence[Row]) -> Iterator[str]:
    """A heat map shows how much worse than dense a row is."""
    known = [row for row in rows if row.method in study.methods]
    dense = {row.model for row in known if study.method(row.method).kind == "dense"}
    for model in dict.fromkeys(row.model for row in known if row.model not in dense):
        yield f"{place}: a heat map shows losses above those of the dense model; add the dense row of '{model}'"


def _table_suites(study: Study) -> Iterator[str]:
    allowed: dict[str, tuple[type[Section], ...]] = {
        "accuracy": (ZeroShotSuite, PerplexitySuite),
        "differences": (ZeroShotSuite, PerplexitySuite, CostSuite),
        "statistics": (CostSuite,),
        "times": (CostSuite,),
        "allocations": (),
        "generations": (GenerationSuite,),
        "agreement": (),
        "arithmetic": (),
    }
    for name, table in study.tables.items():
        for index, suite in enumerate(table.suites):
            if suite in study.suites and not isinstance(study.suites[suite], allowed[table.kind]):
                kind = study.suites[suite].kind
                yield f"tables.{name}.suites[{index}]: a table of {table.kind} does not show a {kind} suite"
        for index, shown in enumerate(getattr(table, "tables", [])):
            if shown in study.tables and study.tables[shown].kind not in ("accuracy", "statistics"):
                of = f"'{shown}' is a table of {study.tables[shown].kind}"
                yield f"tables.{name}.tables[{index}]: {of}; name tables of accuracy or statistics"
        if table.kind in ("statistics", "times") and len(table.suites) > 1:
            yield f"tables.{name}.suites[1]: a table of {table.kind} shows one suite; make a table for each"
        yield from _rows_of_table(study, f"tables.{name}", table)
        if allowed[table.kind] and not table.suites:
            yield f"tables.{name}.suites: a table of {table.kind} needs at least one suite"
    for name, figure in study.figures.items():
        if isinstance(figure, ComparisonFigure):
            for index, earlier in namesakes(figure.rows):
                row = figure.rows[index]
                yield (
                    f"figures.{name}.rows[{index}]: '{row.title}' of '{row.model}' at {row.ratio} % stands in "
                    f"rows[{earlier}] already; leave one out, or give it a `label` of its own"
                )
            if figure.kind == "heat-map":
                yield from _without_dense(study, f"figures.{name}.rows", figure.rows)
        judge = study.suites.get(getattr(figure, "suite", ""))
        if judge and not isinstance(judge, PerplexitySuite):
            yield f"figures.{name}.suite: a figure of perplexity does not show a {judge.kind} suite"


def _rows_of_table(study: Study, place: str, table: Table) -> Iterator[str]:
    """Rows that a table of their kind has nothing to show for, or has twice."""
    if table.kind == "differences":
        yield from _corpora_of_two_suites(study, place, table)
        yield from _speeds_without_dense(study, place, table)
    against_dense = getattr(table, "reference", "first") == "dense"
    if against_dense:
        yield from _compared_with_dense(place, table)
    blocks = Counter((row.model, row.ratio) for row in table.rows)
    shown = Counter((row.model, row.method, row.ratio, row.tuning) for row in table.rows)
    for index, row in enumerate(table.rows):
        compares = table.kind == "differences" and not against_dense and row.ratio > 0
        if compares and blocks[row.model, row.ratio] == 1:
            yield (
                f"{place}.rows[{index}]: the only row of '{row.model}' at {row.ratio} %, so there is nothing to "
                "compare; the first row of a model and ratio is what its others are compared with, unless the table "
                "says `reference: dense`"
            )
        if table.kind == "allocations" and row.method in study.methods and not study.method(row.method).has_pairs:
            yield f"{place}.rows[{index}].method: '{row.method}' makes no low-rank pairs, so it has no ranks to show"
        if (twice := shown.pop((row.model, row.method, row.ratio, row.tuning), 1)) > 1:
            yield f"{place}.rows[{index}]: stands {twice} times in this table"


def _compared_with_dense(place: str, table: Table) -> Iterator[str]:
    """Models of which the dense row is not there, or nothing else."""
    for model in dict.fromkeys(row.model for row in table.rows):
        ratios = {row.ratio for row in table.rows if row.model == model}
        if 0 not in ratios:
            yield f"{place}.rows: `reference: dense` compares with the dense model; add the dense row of '{model}'"
        elif ratios == {0}:
            yield f"{place}.rows: of '{model}' only the dense model, with which `reference: dense` compares other rows"


def _speeds_without_dense(study: Study, place: str, table: Table) -> Iterator[str]:
    """Speeds are shown against those of the dense model; and a table of differences compares something besides."""
    costs = [name for name in table.suites if isinstance(study.suites.get(name), CostSuite)]
    if costs and len(costs) == len(table.suites):
        yield f"{place}.suites: '{costs[0]}' compares no losses; a table of differences needs a suite that does"
    dense = {row.model for row in table.rows if not row.ratio}
    for model in dict.fromkeys(row.model for row in table.rows if costs and row.model not in dense):
        yield f"{place}.rows: '{costs[0]}' shows speeds against the dense model; add the dense row of '{model}'"


def _corpora_of_two_suites(study: Study, place: str, table: Table) -> Iterator[str]:
    """A table of differences has one column a corpus, and of a suite of tasks one with its name."""
    owners: dict[str, str] = {}
    corpora = {c for name in table.suites for c in getattr(study.suites.get(name), "corpora", ())}
    for index, name in enumerate(table.suites):
        suite = study.suites.get(name)
        if isinstance(suite, ZeroShotSuite) and name in corpora:
            yield (
                f"{place}.suites[{index}]: '{name}' is the name of a suite of tasks and of a corpus, and a table of "
                "differences has a column of that name for each; rename the suite"
            )
        for corpus in suite.corpora if isinstance(suite, PerplexitySuite) else ():
            if owners.setdefault(corpus, name) != name:
                yield (
                    f"{place}.suites[{index}]: '{name}' and '{owners[corpus]}' both judge on '{corpus}', and a table "
                    "of differences has one column a corpus; show one of the two suites"
                )


def _limits(study: Study) -> Iterator[str]:
    for name, suite in study.suites.items():
        if isinstance(suite, ZeroShotSuite) and suite.limit is not None and not study.smoke:
            yield f"suites.{name}.limit: a limit on documents is allowed only in a config with `smoke: true`"


def _tasks(study: Study) -> Iterator[str]:
    """Tasks whose rows are not known here, and metrics that the harness does not compute of them."""
    for name in study.tasks:
        if name not in METRICS:
            yield f"tasks.{name}: the scored rows of this task are not known here; known are: {', '.join(METRICS)}"
    for name, suite in study.suites.items():
        for task, metric in suite.tasks.items() if isinstance(suite, ZeroShotSuite) else ():
            if metric not in METRICS.get(task, (metric,)):
                yield f"suites.{name}.tasks.{task}: '{metric}' is not computed of it, only {', '.join(METRICS[task])}"


def _overlaps(study: Study) -> Iterator[str]:
    """No perplexity is reported on text that calibration or validation saw, no loss on what predicted it."""
    seen = {corpus: f"calibration.{name}" for name, c in study.calibration.items() for corpus in c.corpora}
    seen |= {corpus: f"validation.{name}" for name, v in study.validation.items() for corpus in v.corpora}
    for name, suite in study.suites.items():
        if not isinstance(suite, PerplexitySuite):
            continue
        for index, tested in enumerate(suite.corpora):
            for used, where in seen.items():
                if tested in study.corpora and used in study.corpora and _share(study, tested, used):
                    yield (
                        f"suites.{name}.corpora[{index}]: '{tested}' shares documents with '{used}', which {where} "
                        "uses; give them disjoint `documents:` ranges of the file, or different files"
                    )
    for name, figure in study.figures.items():
        if isinstance(figure, PredictedLossFigure) and figure.calibration in study.calibration:
            for used in study.calibration[figure.calibration].corpora:
                if figure.corpus in study.corpora and used in study.corpora and _share(study, figure.corpus, used):
                    yield (
                        f"figures.{name}.corpus: '{figure.corpus}' shares documents with '{used}', which "
                        f"calibration.{figure.calibration} uses; predictions are to be tested on other text"
                    )


def _share(study: Study, first: str, second: str) -> bool:
    one, two = study.corpora[first], study.corpora[second]
    if one.source != two.source:
        return False
    (start, stop), (other_start, other_stop) = one.documents, two.documents
    return (stop is None or other_start < stop) and (other_stop is None or start < other_stop)


def _transfers(study: Study) -> Iterator[str]:
    """A transfer starts from an allocation that was searched by itself; so no transfer leads back to itself."""
    for name in study.methods:
        method = study.method(name)
        if method.transfer is None:
            continue
        source = method.transfer.method
        if source in study.methods and (study.method(source).search is None or study.method(source).transfer):
            yield f"methods.{name}.transfer.method: '{source}' has no search of its own to take an allocation from"
        elif _searches_scales(study, method):
            yield f"methods.{name}.search: '{method.search}' searches loss scales; kept ratios cannot start it"
        elif source in study.methods and _searches_scales(study, study.method(source)):
            yield f"methods.{name}.transfer.method: '{source}' searches loss scales, which are no kept ratios"


def _searches_scales(study: Study, method: MethodSettings) -> bool:
    search = study.search.get(method.search or "")
    return search is not None and search.variables == "loss-scales"


def _allocates_by_loss(study: Study, method: MethodSettings) -> bool:
    return method.kind == "rankwise" or _searches_scales(study, method)


def _predicted_losses(study: Study) -> Iterator[str]:
    """What allocates by predicted loss needs bases that know it."""
    for name in study.methods:
        method = study.method(name)
        covariance = study.covariance.get(method.covariance or "")
        if _allocates_by_loss(study, method) and covariance is not None and covariance.gradients == "none":
            yield (
                f"methods.{name}.covariance: '{method.covariance}' has `gradients: none`, and '{method.kind}' "
                "allocates by the loss that they predict; write `gradients: weigh` (or `predict`) there"
            )
    for name, figure in study.figures.items():
        for index, preset in enumerate(figure.covariance if isinstance(figure, PredictedLossFigure) else []):
            if preset in study.covariance and study.covariance[preset].gradients == "none":
                yield (
                    f"figures.{name}.covariance[{index}]: '{preset}' has `gradients: none`, so it predicts no loss; "
                    "write `gradients: weigh` (or `predict`) there"
                )


def _identity_blocks(study: Study) -> Iterator[str]:
    """Pairs with an identity block reach larger ranks than bases hold by themselves."""
    for name in study.methods:
        method = study.method(name)
        if method.kind == "rankwise":  # whose bases hold all directions anyway
            continue
        covariance = study.covariance.get(method.covariance or "")
        if getattr(method, "identity_block", False) and covariance and not covariance.holds_all_directions:
            yield (
                f"methods.{name}.identity_block: '{method.covariance}' holds directions up to the break-even rank of "
                "plain pairs only; write `directions: all` there"
            )


def _covariance_groups(study: Study) -> Iterator[str]:
    pairs: list[tuple[str, str | None, str | None]] = []
    for name in study.methods:
        method = study.method(name)
        pairs.append((f"methods.{name}", method.calibration, method.covariance))
    for name, validation in study.validation.items():
        pairs.append((f"validation.{name}.select", validation.select.calibration, validation.select.covariance))
    for name, sensitivity in study.sensitivity.items():
        pairs.append((f"sensitivity.{name}", sensitivity.calibration, sensitivity.covariance))
    for name, figure in study.figures.items():
        if isinstance(figure, PredictedLossFigure):
            pairs += [(f"figures.{name}", figure.calibration, preset) for preset in figure.covariance]
    for place, calibration, covariance in pairs:
        if calibration in study.calibration and covariance in study.covariance:
            groups, windows = study.covariance[covariance].groups or 1, study.calibration[calibration].windows
            if groups > windows:
                yield (
                    f"{place}.covariance: '{covariance}' pools {groups} groups, but '{calibration}' has only "
                    f"{windows} windows; calibrate on more windows or pool fewer groups"
                )
