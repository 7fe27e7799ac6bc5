"""Checks of presets against the models they are used with: window lengths, groups of layers, types, budgets.

A preset that nothing uses is not checked against any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowrank.budget import ALIGNMENT, Budget, largest_rank, lord_kept
from lowrank.config.outputs import ComparisonFigure, PerplexityFigure, SearchFigure
from lowrank.config.sources import ModelShape
from lowrank.config.study import Study
from lowrank.config.suites import CostSuite, PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.families import FAMILIES


@dataclass(frozen=True)
class Use:
    """One model after one method at one ratio, as a table or figure asks for it.

    Attributes:
        place: YAML path of its ratio.
        tuning: name of the post-training preset, or `none`.
        suites: names of the suites that judge it.
    """

    place: str
    model: str
    method: str
    ratio: int
    tuning: str
    suites: tuple[str, ...]


def problems_of_fit(study: Study) -> Iterator[str]:
    """What does not fit, each with its YAML path; unknown names are passed over, since they are reported elsewhere."""
    yield from _lengths(study)
    first: dict[tuple[str, str, int], Use] = {}
    for use in _uses(study):
        if use.model in study.models and use.method in study.methods:
            first.setdefault((use.model, use.method, use.ratio), use)
    for use in first.values():  # what ten rows do wrong in the same way is said once
        yield from _method_problems(study, use)
        yield from _validation_problems(study, use)


def why_out_of_reach(shape: ModelShape, ratio: int, uncompressed: Sequence[str], lower: float) -> str | None:
    """Why no allocation removes this share, or None if there is one.

    The conditions are those of `lowrank.search_space.SearchSpace`, here without torch; all blocks of a model have the
    same shapes, so one stands for all.

    Args:
        shape: of the model.
        ratio: percent of the decoder's linear weights to remove.
        uncompressed: types that stay dense.
        lower: smallest kept ratio of a compressed matrix.
    """
    budget = Budget.of(shape.model_copy(update={"layers": 1}))
    free = [module for module in budget.modules if module.type.name not in uncompressed]
    weights = sum(module.parameters for module in free)
    fixed = budget.dense_parameters - weights
    biases = sum(budget.cost(module, 0) for module in free)
    left = budget.allowed(ratio) - fixed
    if left - biases <= lower * weights:
        least = 100 * (fixed + biases + lower * weights) / budget.dense_parameters
        bound = f" and at least {100 * lower:g} % of every other matrix" if lower else ""
        cure = "lower `lower`, " if lower else ""
        return (
            f"removing {ratio} % is out of reach: with {_listed(uncompressed)} dense{bound}, {least:.1f} % stays; "
            f"{cure}compress more types, or remove less"
        )
    ranks = [max(1, min(ALIGNMENT, largest_rank(module.out_features, module.in_features))) for module in free]
    if sum(budget.cost(module, rank) for module, rank in zip(free, ranks, strict=True)) > left:
        return f"removing {ratio} % is out of reach: even ranks of {ALIGNMENT} exceed the budget; remove less"
    return None


def _uses(study: Study) -> Iterator[Use]:
    for name, table in study.tables.items():
        for index, row in enumerate(table.rows):
            place = f"tables.{name}.rows[{index}].ratio"
            yield Use(place, row.model, row.method, row.ratio, row.tuning, tuple(table.suites))
    for name, figure in study.figures.items():
        if isinstance(figure, ComparisonFigure):
            for index, row in enumerate(figure.rows):
                place = f"figures.{name}.rows[{index}].ratio"
                yield Use(place, row.model, row.method, row.ratio, row.tuning, (figure.suite,))
        if isinstance(figure, PerplexityFigure | SearchFigure):
            suites = (figure.suite,) if isinstance(figure, PerplexityFigure) else ()
            for method in figure.methods:
                for index, ratio in enumerate(figure.ratios):
                    place = f"figures.{name}.ratios[{index}]"
                    yield Use(place, figure.model, method, ratio, "none", suites)


def _method_problems(study: Study, use: Use) -> Iterator[str]:
    method, shape = study.method(use.method), study.models[use.model].shape
    place = f"methods.{use.method}"
    uncompressed: Sequence[str] | None = getattr(method, "uncompressed", None)
    if uncompressed is None:  # a method whose allocation is not a matter of its preset
        if method.kind == "lord":
            try:
                lord_kept(Budget.of(shape), use.ratio)
            except RankwiseError as error:
                yield f"{use.place}: {error} (`{place}`, model '{use.model}')"
        return
    yield from _groups_and_types(place, use.model, shape, getattr(method, "groups", 1), uncompressed)
    search = study.search.get(method.search or "")
    if use.ratio and not _unknown_types(shape, uncompressed) and (search or not method.search):
        why = why_out_of_reach(shape, use.ratio, uncompressed, search.lower if search else 0.0)
        if why:
            by = f", `search.{method.search}`" if search else ""
            yield f"{use.place}: {why} (`{place}`{by}, model '{use.model}')"


def _validation_problems(study: Study, use: Use) -> Iterator[str]:
    name = study.method(use.method).validation
    if name not in study.validation:
        return
    select, shape = study.validation[name].select, study.models[use.model].shape
    place = f"validation.{name}.select"
    yield from _groups_and_types(place, use.model, shape, select.groups, select.uncompressed)
    if _unknown_types(shape, select.uncompressed):
        return
    if why := why_out_of_reach(shape, select.ratio, select.uncompressed, select.lower):
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
    for use in _uses(study):
        if use.method in study.methods:
            method = study.method(use.method)
            yield from _calibration_length(study, use.model, method.calibration)
            if method.validation in study.validation:
                validation = study.validation[method.validation]
                yield use.model, f"validation.{method.validation}.length", validation.length
                yield from _calibration_length(study, use.model, validation.select.calibration)
        if use.tuning in study.tuning:
            yield use.model, f"tuning.{use.tuning}.max_length", study.tuning[use.tuning].max_length
        for name in use.suites:
            suite = study.suites.get(name)
            if isinstance(suite, PerplexitySuite):
                yield use.model, f"suites.{name}.length", suite.length
            if isinstance(suite, CostSuite):
                together = suite.prompt_tokens + suite.new_tokens
                yield use.model, f"suites.{name}.prompt_tokens (with `new_tokens`)", together
                yield use.model, f"suites.{name}.mac_tokens", suite.mac_tokens


def _calibration_length(study: Study, model: str, name: str | None) -> Iterator[tuple[str, str, int]]:
    if name in study.calibration:
        yield model, f"calibration.{name}.length", study.calibration[name].length
