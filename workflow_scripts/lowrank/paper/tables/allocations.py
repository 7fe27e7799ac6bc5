"""Tables of ranks by type of matrix and group of layers (Table 8 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from lowrank.config.outputs import RowTable
from lowrank.config.published import Published
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES, Dimensions, linear_modules
from lowrank.paper.tables import rows as shared
from lowrank.paper.tables.data import MISSING, Cell, Column, Context, Json, Line, RowResults, TableData

DENSE = "NA"
Ranks = dict[str, int | str | None]
"""Type of matrix -> rank; None: left dense; of experts with several ranks a text, the smallest and the largest."""


def build_allocations(table: RowTable, rows: Sequence[RowResults], context: Context) -> TableData:
    """Build a table of ranks. Consecutive layers with the same ranks in all types share a line.

    Raises:
        RankwiseError: a manifest is missing or names other modules than the model has, or a published row is unknown.
    """
    found = [_allocations(results, context) for results in rows]
    types = _types(found)
    headings = _headings(rows, context, types)
    lines: list[Line] = []
    records: list[dict[str, Any]] = []
    for number, ((results, starts_block), allocations) in enumerate(zip(shared.block_starts(rows), found, strict=True)):
        several_seeds = len(allocations) > 1
        texts = shared.leading_texts(rows, results)
        for seed, groups in allocations.items():
            name = f"{texts[-1]}, seed {seed}" if several_seeds else texts[-1]
            for (first, last), ranks in groups:
                cells = [*texts[:-1], name, _layers(first, last), *_rank_texts(headings, ranks)]
                lines.append(Line(tuple(map(Cell, cells)), starts_block=starts_block))
                starts_block = False
                record = shared.record_start(results, number)
                record |= {"seed": seed, "first_layer": first, "last_layer": last}
                records.append(record | {f"rank_{t}": ranks.get(t) for t in types} | shared.evidence_record(results))
        published = shared.published_of(results, context)
        if published is not None:
            lines += _published_lines(rows, published, headings)
            records += _published_records(published, number)
    leading = shared.leading_columns(rows)
    return TableData(
        title=table.title,
        notes=(
            *shared.model_note(rows),
            f"Ranks of the low-rank factors by type of matrix and range of layers; {DENSE}: left dense. "
            "Consecutive layers with the same ranks share a line.",
            *(["Of experts whose ranks differ: from the smallest to the largest."] if _any_range(found) else []),
            *shared.published_notes(rows, context),
        ),
        frame=shared.frame_of(records),
        columns=(*leading, Column("Layers"), *(Column(heading) for heading in headings)),
        lines=tuple(lines),
        heading=len(leading) + 1,
    )


Groups = list[tuple[tuple[int, int], Ranks]]


def _allocations(results: RowResults, context: Context) -> dict[int | None, Groups]:
    """Seed -> groups of layers, ((first, last), ranks); a dense row has no seed and one group."""
    shape = context.shapes[results.row.model]
    if results.row.ratio == 0:
        dense: Ranks = dict.fromkeys([linear.name for linear in FAMILIES[shape.family].types])
        return {None: [((0, shape.layers - 1), dense)]}
    shared.kept_percent(results)  # refuses a row that missed its ratio
    return {
        manifest["subject"]["seed"]: group_layers(layer_ranks(manifest["ranks"], shape, results.place))
        for manifest in shared.checkpoints_of(results)
    }


def layer_ranks(ranks: Json, shape: ModelShape, place: str) -> list[Ranks]:
    """Ranks by layer and type from the ranks by module path.

    Raises:
        RankwiseError: the manifest names a module that the model does not have.
    """
    layers: list[dict[str, list[int | None]]] = [{} for _ in range(shape.layers)]
    modules = {module.name: module for module in linear_modules(cast(Dimensions, shape))}
    if unknown := sorted(set(ranks) - set(modules)):
        raise RankwiseError(f"{place}: the manifest holds a rank for '{unknown[0]}', which the model does not have.")
    for name, module in modules.items():
        layers[module.layer].setdefault(module.type.name, []).append(ranks.get(name))
    return [{name: _range(of_experts) for name, of_experts in layer.items()} for layer in layers]


def _range(ranks: Sequence[int | None]) -> int | str | None:
    """The rank of a layer's matrices of one type, one or that of each expert."""
    if len(set(ranks)) == 1:
        return ranks[0]
    compressed = [rank for rank in ranks if rank is not None]
    return f"{min(compressed)}–{DENSE if None in ranks else max(compressed)}"


def _any_range(found: Sequence[Mapping[int | None, Groups]]) -> bool:
    groups = [ranks for allocations in found for groups in allocations.values() for _, ranks in groups]
    return any(isinstance(rank, str) for ranks in groups for rank in ranks.values())


def group_layers(layers: Sequence[Ranks]) -> Groups:
    """Merge consecutive layers whose ranks are equal in all types: ((first, last), ranks), in order."""
    groups: Groups = []
    for index, ranks in enumerate(layers):
        if groups and groups[-1][1] == ranks:
            groups[-1] = ((groups[-1][0][0], index), ranks)
        else:
            groups.append(((index, index), ranks))
    return groups


def _types(found: Sequence[Mapping[int | None, Groups]]) -> list[str]:
    """All types of all rows, in the order of the forward pass."""
    groups = [ranks for allocations in found for groups in allocations.values() for _, ranks in groups]
    return list(dict.fromkeys(name for ranks in groups for name in ranks))


def _headings(rows: Sequence[RowResults], context: Context, types: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Heading -> the types below it: types that share a search variable share a column, as q and k do."""
    tied: dict[str, list[str]] = {}
    for results in rows:
        for linear in FAMILIES[context.shapes[results.row.model].family].types:
            members = tied.setdefault(linear.tied, [])
            if linear.name in types and linear.name not in members:
                members.append(linear.name)
    return {"/".join(members): tuple(members) for members in tied.values()}


def _rank_texts(headings: Mapping[str, tuple[str, ...]], ranks: Ranks) -> list[str]:
    texts = []
    for members in headings.values():
        shown = [DENSE if ranks[name] is None else str(ranks[name]) for name in members if name in ranks]
        # Types of another family, where a table has several, are none of this model's.
        texts.append(MISSING if not shown else shown[0] if len(set(shown)) == 1 else "/".join(shown))
    return texts


def _layers(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _published_lines(
    rows: Sequence[RowResults], published: Published, headings: Mapping[str, tuple[str, ...]]
) -> list[Line]:
    lines = []
    for values in published.values:
        texts = [*shared.published_texts(rows, published), f"group {_whole(values['group'])}"]
        for heading in headings:
            key = heading.replace("/", "")  # q/k is printed as qk
            texts.append(_whole(values[key]) if key in values else MISSING)
        lines.append(Line(tuple(map(Cell, texts)), source="published"))
    return lines


def _published_records(published: Published, number: int) -> list[dict[str, Any]]:
    start = shared.published_record(published, number)
    return [
        start | {"group" if key == "group" else f"rank_{key}": value for key, value in values.items()}
        for values in published.values
    ]


def _whole(value: float | None) -> str:
    return DENSE if value is None else f"{value:.0f}"
