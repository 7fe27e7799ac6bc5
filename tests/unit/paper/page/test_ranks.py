"""Heat maps: shares by type and layer, widths that changed, and what cannot be shown."""

from __future__ import annotations

import pytest

from lowrank.paper.page.ranks import Run, heat_maps
from lowrank.paper.page.results import checkpoints
from lowrank.paper.tables.data import RowResults
from lowrank.paper.tables.measures import measures_of
from tests.unit.paper.paper_samples import SHAPE, context, dense_results, evidence, row_results


def maps_of(*rows: RowResults):  # type: ignore[no-untyped-def]
    return heat_maps(checkpoints(evidence(*rows), ["tiny"], measures_of(context())), {"tiny": SHAPE})


def test_a_strip_has_the_share_of_each_layer_and_joins_equal_ones() -> None:
    results = row_results()
    sizes = results.manifests[0]["linears"]
    name = "model.layers.3.self_attn.q_proj"
    sizes[name]["parameters"] = 1024  # of 64 x 64; the others are pairs of rank 20, 2560
    (found,), left_out = maps_of(dense_results(), results)
    strips = {strip.name: strip for strip in found.strips}
    assert list(strips) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert strips["q"].runs == [Run(0, 2, 0.625), Run(3, 3, 0.25)]
    assert strips["q"].mean == pytest.approx((3 * 0.625 + 0.25) / 4)
    assert strips["v"].runs == [Run(0, 3, 1.0)], "left dense"
    assert (found.layers, left_out) == (4, [])


def test_fewer_neurons_have_a_line_of_their_own() -> None:
    results = row_results()
    results.manifests[0]["linears"]["model.layers.1.mlp.down_proj"]["in_features"] = 32
    (found,), _ = maps_of(results)
    assert found.strips[-1].name == "neurons"
    assert found.strips[-1].runs == [Run(0, 0, 1.0), Run(1, 1, 0.25), Run(2, 3, 1.0)]


def test_weights_outside_of_all_matrices_are_told() -> None:
    results = row_results()
    of_all = sum(size["parameters"] for size in results.manifests[0]["linears"].values())
    results.manifests[0]["parameters"] |= {"decoder_linears": of_all + 500, "decoder_linears_dense": 10_000}
    assert maps_of(results)[0][0].elsewhere == pytest.approx(0.05)
    results.manifests[0]["parameters"]["decoder_linears"] = of_all + 5
    assert maps_of(results)[0][0].elsewhere == 0


def test_an_older_manifest_is_named_and_tuned_rows_are_not_repeated() -> None:
    old, tuned = row_results(), row_results(tuning="scales")
    del old.manifests[0]["linears"]
    maps, left_out = maps_of(old, tuned, row_results(method="svd"))
    assert [each.checkpoint.row.method for each in maps] == ["svd"]
    assert [each.row.title for each in left_out] == ["lord"]


def test_what_was_judged_only_after_post_training_is_shown_once() -> None:
    """With the sizes that it was compressed to."""
    scales, lora = row_results(tuning="scales"), row_results(tuning="lora")
    before = row_results()
    before.manifests[0]["linears"]["model.layers.0.self_attn.q_proj"]["parameters"] = 1024
    unjudged = RowResults(before.row, {}, before.manifests, before.place)
    maps, left_out = maps_of(unjudged, scales, lora)
    assert [each.checkpoint.row.title for each in maps] == ["lord + scales"]
    assert maps[0].strips[0].runs[0] == Run(0, 0, 0.25)
    assert not left_out
