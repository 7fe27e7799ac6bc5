"""Checks of presets against the models they are used with: window lengths, groups of layers, types, budgets.

A preset that nothing uses is not checked against any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank.config.low_rank import LowRankSettings, UniformSettings
from lowrank.config.outputs import (
    ComparisonFigure,
    PerplexityFigure,
    PredictedLossFigure,
    Row,
    SearchFigure,
    tolerance_holder,
)
from lowrank.config.presets import Covariance, MethodSettings, Search
from lowrank.config.sources import ModelShape
from lowrank.config.study import Study
from lowrank.config.suites import CostSuite, GenerationSuite, PerplexitySuite
from lowrank.config.tuning import FeatureDistillation, ScaledSubspaceTuning
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.ranks import reach
from lowrank.ranks.budget import Budget


@dataclass(frozen=True)
class Use:
    """One model after one method at one ratio, as a table or figure asks for it, or needs it.

    Attributes:
        place: YAML path of its ratio.
        tuning: name of the post-training preset, or `none`.
        suites: names of the suites that judge it.
        row: what asks whether that which is removed meets the ratio; None where nothing does, as in a search.
    """

    place: str
    model: str
    method: str
    ratio: int
    tuning: str
    suites: tuple[str, ...]
    row: Row | None = None


def problems_of_fit(study: Study) -> Iterator[str]:
    """What does not fit, each with its YAML path; unknown names are passed over, since they are reported elsewhere."""
    yield from _lengths(study)
    first: dict[tuple[str, str, int], Use] = {}
    for use in _uses(study):
        if use.model in study.models and use.method in study.methods:
            first.setdefault((use.model, use.method, use.ratio), use)
    found = dict.fromkeys(_tuning_problems(study))  # what ten rows do wrong in the same way is said once
    for use in first.values():
        found |= dict.fromkeys([*_method_problems(study, use), *_validation_problems(study, use)])
    yield from found
    yield from _missed_ratios(study)


def why_out_of_reach(
    budget: Budget, ratio: int, uncompressed: Sequence[str], lower: float, search: Search | None = None
) -> str | None:
    """Why no allocation removes this share, or None if there is one.

    Args:
        budget: of the model, with the form of the pairs.
        ratio: percent of the decoder's linear weights to remove.
        uncompressed: types that stay dense.
        lower: smallest kept ratio of a compressed matrix.
        search: whose other bounds hold as well.
    """
    if search is None:
        return reach.why_out_of_reach(budget, ratio, uncompressed, lower)
    return reach.why_out_of_reach(budget, ratio, uncompressed, lower, search.upper, search.bounds, search.band)


def _uses(study: Study) -> Iterator[Use]:
    """All that is asked for, and the searches for other models that theirs begin with."""
    for use in _asked_for(study):
        yield use
        transfer = study.method(use.method).transfer if use.method in study.methods else None
        if transfer is not None:
            yield Use(use.place, transfer.model, transfer.method, use.ratio, "none", ())


def _asked_for(study: Study) -> Iterator[Use]:
    for name, table in study.tables.items():
        for index, row in enumerate(table.rows):
            place = f"tables.{name}.rows[{index}].ratio"
            yield Use(place, row.model, row.method, row.ratio, row.tuning, tuple(table.suites), row)
    for name, figure in study.figures.items():
        if isinstance(figure, ComparisonFigure):
            for index, row in enumerate(figure.rows):
                place = f"figures.{name}.rows[{index}].ratio"
                yield Use(place, row.model, row.method, row.ratio, row.tuning, (figure.suite,), row)
        if isinstance(figure, PerplexityFigure | SearchFigure):
            suites = (figure.suite,) if isinstance(figure, PerplexityFigure) else ()
            for method in figure.methods:
                for index, ratio in enumerate(figure.ratios):
                    place = f"figures.{name}.ratios[{index}]"
                    point = figure.point(method, ratio) if isinstance(figure, PerplexityFigure) else None
                    yield Use(place, figure.model, method, ratio, "none", suites, point)


def _method_problems(study: Study, use: Use) -> Iterator[str]:
    method, shape = study.method(use.method), study.models[use.model].shape
    place, budget = f"methods.{use.method}", _budget(shape, method, study.covariance.get(method.covariance or ""))
    if undefined := method.why_not_experts(shape):
        yield f"{place}.kind: '{method.kind}' is {undefined} (model '{use.model}')"
        return
    if use.ratio:
        calibration = study.calibration.get(method.calibration or "")
        for key, reason in method.misfits(budget, use.ratio, calibration):
            about = f"model '{use.model}'"
            yield f"{place}.{key}: {reason} ({about})" if key else f"{use.place}: {reason} (`{place}`, {about})"
    uncompressed: Sequence[str] | None = getattr(method, "uncompressed", None)
    if uncompressed is None:  # a method whose allocation is not a matter of its preset
        return
    yield from _groups_and_types(place, use.model, shape, getattr(method, "groups", 1), uncompressed)
    search = study.search.get(method.search or "")
    if _unknown_types(shape, uncompressed) or (method.search and not search):
        return
    if search:
        unknown = list(_unsearched_types(f"search.{method.search}", use, shape, uncompressed, search))
        yield from unknown
        if unknown:
            return
    if method.transfer:
        yield from _transfer_problems(study, use, shape, uncompressed)
    if use.ratio and isinstance(method, UniformSettings) and method.rounds_down:
        try:
            method.kept_ratios(budget, use.ratio)
        except RankwiseError as error:
            yield f"{use.place}: {error} (`{place}`, model '{use.model}')"
    elif use.ratio:
        bounded = search if search and search.variables == "kept-ratios" else None
        why = why_out_of_reach(budget, use.ratio, uncompressed, bounded.lower if bounded else 0.0, bounded)
        if why:
            by = f", `search.{method.search}`" if bounded else ""
            yield f"{use.place}: {why} (`{place}`{by}, model '{use.model}')"


def _missed_ratios(study: Study) -> Iterator[str]:
    """Rows that no table would show, since what shapes alone say is kept misses the ratio by more than a row allows."""
    uses = [use for use in _uses(study) if use.model in study.models and use.method in study.methods and use.ratio]
    for use in uses:
        if use.row is None or (kept := _kept_percent(study, use)) is None or use.row.met_by(kept):
            continue
        method = study.method(use.method)
        keeper = "by the shapes alone, it"
        cure = f"write `tolerance: {use.row.tolerance_for(kept):g}` on the {tolerance_holder(use.place)}"
        if method.sets_aside_ratio:
            keeper = f"`{method.beside_ratio}: {getattr(method, method.beside_ratio)}`"
            without = method.model_copy(update={method.beside_ratio: method.default_of(method.beside_ratio)})
            others = [other for other in uses if other.method == use.method]
            if all(_is_met(study, other, without) for other in others):
                cure += f", or leave out `{method.beside_ratio}`"
        yield (
            f"{use.place}: {keeper} keeps {kept:.2f} % of the decoder's linear weights where {100 - use.ratio} % are "
            f"asked for, give or take {use.row.tolerance:g} points; {cure} (`methods.{use.method}`, model "
            f"'{use.model}')"
        )


def _kept_percent(study: Study, use: Use, method: MethodSettings | None = None) -> float | None:
    """What shapes alone say that a use keeps, in percent; None if they cannot, or if the ratio is out of reach.

    Args:
        study: the study.
        use: a use of it.
        method: another preset to take in place of its own.
    """
    method = method or study.method(use.method)
    if method.why_not_experts(study.models[use.model].shape):  # which is reported elsewhere
        return None
    budget = _budget(study.models[use.model].shape, method, study.covariance.get(method.covariance or ""))
    try:
        kept = method.kept_parameters(budget, use.ratio)
    except RankwiseError:  # which is reported elsewhere
        return None
    return None if kept is None else 100 * (kept / budget.dense_parameters)


def _is_met(study: Study, use: Use, method: MethodSettings) -> bool:
    """Whether a use would pass with another preset, as far as shapes tell."""
    kept = _kept_percent(study, use, method)
    return kept is not None and (use.row is None or use.row.met_by(kept))


def _budget(shape: ModelShape, method: MethodSettings, covariance: Covariance | None) -> Budget:
    """A model's budget as a method's stages have it."""
    budget = Budget.of(shape)
    return method.budget_of_pairs(budget, covariance) if isinstance(method, LowRankSettings) else budget


def _unsearched_types(
    place: str, use: Use, shape: ModelShape, uncompressed: Sequence[str], search: Search
) -> Iterator[str]:
    """Bounds and starting ratios of types that have no variable, and variables without a starting ratio."""
    modules = Budget.of(shape.model_copy(update={"layers": 1})).modules
    free = reach.tied_types(module for module in modules if module.type.name not in uncompressed)
    where = f"that `methods.{use.method}` searches in model '{use.model}'"
    for key, named in (("bounds", search.bounds), ("start_at", search.start_at or {})):
        for name in named:
            if name not in free:
                yield f"{place}.{key}.{name}: is no type of matrices {where} (there are: {_listed(free)})"
    if search.start_at is not None and (missing := [name for name in free if name not in search.start_at]):
        yield f"{place}.start_at: has no ratio for {_listed(missing)}, {where}"


def _transfer_problems(study: Study, use: Use, shape: ModelShape, uncompressed: Sequence[str]) -> Iterator[str]:
    """A transfer needs a model with the same types of layers."""
    transfer = study.method(use.method).transfer
    if transfer is None or transfer.model not in study.models:
        return
    source = study.models[transfer.model].shape
    there = {linear.tied for linear in FAMILIES[source.family].types}
    modules = Budget.of(shape.model_copy(update={"layers": 1})).modules
    free = reach.tied_types(module for module in modules if module.type.name not in uncompressed)
    if missing := [name for name in free if name not in there]:
        yield (
            f"methods.{use.method}.transfer.model: '{transfer.model}' (family '{source.family}') has no layers of type "
            f"{_listed(missing)}, as '{use.model}' (family '{shape.family}') has; choose a model with the same "
            "types of layers"
        )


def _tuning_problems(study: Study) -> Iterator[str]:
    """Post-trainings that would find nothing to train, or no matrix of such a rank, after hours of compression."""
    for use in _uses(study):
        if use.tuning not in study.tuning or use.model not in study.models or use.method not in study.methods:
            continue
        tuning, method = study.tuning[use.tuning], study.method(use.method)
        rank, widest = getattr(tuning, "rank", 0), study.models[use.model].shape.hidden
        if rank > widest:
            yield (
                f"tuning.{use.tuning}.rank: {rank}, but no matrix of model '{use.model}' has a rank of more than "
                f"{widest}, its width"
            )
        known = list(dict.fromkeys(linear.name for linear in FAMILIES[study.models[use.model].shape.family].types))
        if unknown := [name for name in getattr(tuning, "targets", None) or [] if name not in known]:
            yield (
                f"tuning.{use.tuning}.targets: model '{use.model}' has no linear layers of type {_listed(unknown)} "
                f"(there are: {_listed(known)})"
            )
        place = f"{use.place.removesuffix('ratio')}tuning"
        if tuning.needs_pairs and not method.has_pairs and method.kind != "dense":  # which is refused elsewhere
            yield (
                f"{place}: '{use.tuning}' trains low-rank pairs, and '{use.method}' makes none; take a tuning of kind "
                "`lora` with `stages: [all]`"
            )
        if isinstance(tuning, FeatureDistillation):
            yield from _held_out_problems(study, use.tuning, tuning)
        ordered = isinstance(tuning, ScaledSubspaceTuning) and tuning.subspace != "random"
        if ordered and not method.has_order:
            yield (
                f"{place}: '{use.tuning}' takes a subspace by the order of dimensions, and those of pairs with "
                f"identity blocks, as of '{use.method}', have none; write `subspace: random`"
            )


def _held_out_problems(study: Study, name: str, tuning: FeatureDistillation) -> Iterator[str]:
    calibration = study.calibration.get(tuning.calibration)
    if calibration and calibration.windows <= tuning.validation_windows:
        yield (
            f"tuning.{name}.validation_windows: {tuning.validation_windows} of the {calibration.windows} windows of "
            f"`calibration.{tuning.calibration}` leave none to train on; lower it, or take more windows"
        )


def _validation_problems(study: Study, use: Use) -> Iterator[str]:
    name = study.method(use.method).validation
    if name not in study.validation:
        return
    select, shape = study.validation[name].select, study.models[use.model].shape
    if not select.scores:
        return
    place = f"validation.{name}.select"
    yield from _groups_and_types(place, use.model, shape, select.groups, select.uncompressed)
    if _unknown_types(shape, select.uncompressed):
        return
    covariance = study.covariance.get(select.covariance or "")
    budget = replace(Budget.of(shape), adds_bias=covariance is None or covariance.centred)
    if why := why_out_of_reach(budget, select.ratio, select.uncompressed, select.lower):
        yield f"{place}.ratio: {why} (model '{use.model}')"


def _groups_and_types(
    place: str, model: str, shape: ModelShape, groups: int, uncompressed: Sequence[str]
) -> Iterator[str]:
    if groups > shape.layers:
        yield f"{place}.groups: {groups} groups of layers, but model '{model}' has only {shape.layers} layers"
    if unknown := _unknown_types(shape, uncompressed):
        known = ", ".join(linear.name for linear in FAMILIES[shape.family].types)
        yield (
            f"{place}.uncompressed: model '{model}' of family '{shape.family}' has no linear layers of type "
            f"{_listed(unknown)} (there are: {known})"
        )


def _unknown_types(shape: ModelShape, names: Sequence[str]) -> list[str]:
    known = {linear.name for linear in FAMILIES[shape.family].types}
    return [name for name in names if name not in known]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _lengths(study: Study) -> Iterator[str]:
    for model, place, length in _lengths_used(study):
        if model in study.models and length > study.models[model].max_length:
            longest = study.models[model].max_length
            yield f"{place}: {length} tokens, more than the `max_length` of model '{model}' ({longest})"


def _lengths_used(study: Study) -> Iterator[tuple[str, str, int]]:
    """(model, YAML path, tokens) of everything that a model reads at once."""
    for name, sensitivity in study.sensitivity.items():
        yield sensitivity.model, f"sensitivity.{name}.length", sensitivity.length
        yield from _calibration_length(study, sensitivity.model, sensitivity.calibration)
    for name, figure in study.figures.items():
        if isinstance(figure, PredictedLossFigure):
            yield figure.model, f"figures.{name}.length", figure.length
            yield from _calibration_length(study, figure.model, figure.calibration)
    for use in _uses(study):
        if use.method in study.methods:
            method = study.method(use.method)
            yield from _calibration_length(study, use.model, method.calibration)
            if method.validation in study.validation:
                validation = study.validation[method.validation]
                yield use.model, f"validation.{method.validation}.length", validation.length
                yield from _calibration_length(study, use.model, validation.select.calibration)
        if use.tuning in study.tuning:
            tuning = study.tuning[use.tuning]
            if isinstance(tuning, FeatureDistillation):
                yield from _calibration_length(study, use.model, tuning.calibration)
            else:
                yield use.model, f"tuning.{use.tuning}.max_length", tuning.max_length
        for name in use.suites:
            suite = study.suites.get(name)
            if isinstance(suite, PerplexitySuite):
                yield use.model, f"suites.{name}.length", suite.length
            if isinstance(suite, GenerationSuite):
                yield use.model, f"suites.{name}.new_tokens", suite.new_tokens
            if isinstance(suite, CostSuite):
                together = suite.prompt_tokens + suite.new_tokens
                yield use.model, f"suites.{name}.prompt_tokens (with `new_tokens`)", together
                yield use.model, f"suites.{name}.mac_tokens", suite.mac_tokens


def _calibration_length(study: Study, model: str, name: str | None) -> Iterator[tuple[str, str, int]]:
    if name in study.calibration:
        yield model, f"calibration.{name}.length", study.calibration[name].length
