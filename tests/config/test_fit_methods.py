"""What methods say of a model's shapes before anything runs: the config check refuses what they would refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.compression.branches import Structure
from lowrank.compression.sensitivity_search import Trial, cut_trials
from lowrank.compression.slicing import sliced_parameters
from lowrank.compression.structured import lowest_removal, lowest_units
from lowrank.compression.widths import Widths
from lowrank.config.presets import Calibration, MethodSettings, Reads
from lowrank.config.sources import ModelShape
from lowrank.config.study import Study
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from lowrank.methods import asvd, flap, llm_pruner, method_modules, modegpt, slicegpt
from lowrank.ranks.budget import Budget
from lowrank.ranks.reach import candidate_ranks
from tests.config.test_fit import shapes
from tests.config.wrong import BASE, Change, changed, errors_of
from tests.unit.compression.test_widths import by_hand

CALIBRATION = Calibration(corpora=["c"], windows=16, length=64)
PRUNED = {"kind": "llm-pruner", "calibration": "c4-32", "skip_first": 1, "skip_last": 0}


def misfits(method: MethodSettings, shape: ModelShape, ratio: int) -> list[tuple[str, str]]:
    return list(method.misfits(Budget.of(shape), ratio, CALIBRATION))


@settings(max_examples=300, deadline=None)
@given(
    shape=shapes(),
    ratio=st.integers(1, 90),
    layout=st.sampled_from(["AL-AM", "UL-UM", "UL-MM", "AL-MM"]),
    heads=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_flap_is_refused_if_and_only_if_it_would_fail(
    shape: ModelShape, ratio: int, layout: str, heads: int, seed: int
) -> None:
    some = {"remove_heads": heads} if layout.endswith("MM") else {}
    method = flap.Settings(kind="flap", calibration="c", structure=layout, **some)
    budget = Budget.of(shape)
    structure, allowed = Structure.of(budget), budget.allowed(ratio)
    generator = torch.Generator().manual_seed(seed)
    scores = {place: torch.rand(branch.units, generator=generator) for place, branch in structure.places()}
    removed = None
    try:
        fixed = flap.fixed_removal(method, structure, allowed)
        if not isinstance(fixed, int):
            removed = fixed
        elif layout == "AL-AM":
            removed = lowest_removal(structure, scores, allowed)
        else:
            groups = lowest_units(structure, {p: v for p, v in scores.items() if p[1] == "attention"}, fixed)
            neurons = {p: v for p, v in scores.items() if p[1] == "mlp"}
            removed = lowest_removal(structure, neurons, allowed, groups)
    except RankwiseError:
        pass
    found = misfits(method, shape, ratio)
    if found and removed is not None:  # what the check alone knows: no branch may be pruned further than this
        pytest.fail(f"refused although it works: {found}")
    if removed is None and not found:
        # Biases come with every block that loses heads, and how many do is a matter of the scores: AL-MM alone.
        assert layout == "AL-MM"
        biases = shape.layers * structure.attention.added_bias
        most = {place: branch.most for place, branch in structure.places() if branch is structure.mlp}
        assert structure.remaining(most) - heads // structure.heads_per_group * structure.attention.cost + biases > (
            allowed
        )


@settings(max_examples=300, deadline=None)
@given(
    shape=shapes(),
    ratio=st.integers(1, 90),
    first=st.integers(0, 2),
    last=st.integers(0, 1),
    own=st.sampled_from([None, 0.25, 0.9, 0.99]),
)
def test_llm_pruner_is_refused_if_and_only_if_it_would_fail(
    shape: ModelShape, ratio: int, first: int, last: int, own: float | None
) -> None:
    some = {"skip_first": first, "skip_last": last, "own_ratio": own}
    method = llm_pruner.Settings(kind="llm-pruner", calibration="c", **some)
    budget = Budget.of(shape)
    structure = Structure.of(replace(budget, adds_bias=False))
    try:
        counts = llm_pruner.removal(structure, method, budget.allowed(ratio))
        assert own is not None or structure.remaining(counts) <= budget.allowed(ratio)
        possible = True
    except RankwiseError:
        possible = False
    assert (not misfits(method, shape, ratio)) == possible


@settings(max_examples=200, deadline=None)
@given(shape=shapes(), ratio=st.integers(1, 90), share=st.sampled_from([None, 0.2, 0.9, 0.99]))
def test_slicegpt_is_refused_if_and_only_if_it_would_fail(shape: ModelShape, ratio: int, share: float | None) -> None:
    method = slicegpt.Settings(kind="slicegpt", calibration="c", slice=share)
    budget = Budget.of(shape)
    found = misfits(method, shape, ratio)
    if shape.family == "opt":  # whose norms subtract a mean
        assert found
    elif share is None:
        narrowest = (shape.hidden, *[min(8, shape.hidden)] * (2 * shape.layers - 1), shape.hidden)
        assert bool(found) == (sliced_parameters(budget, narrowest) > budget.allowed(ratio))
    else:
        assert bool(found) == ((1 - share) * shape.hidden < 8 - 1e-6)


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    ratio=st.integers(1, 90),
    parts=st.lists(st.sampled_from(["mlp", "qk", "vo"]), min_size=1, unique=True),
    multiple=st.sampled_from([1, 8, 32]),
    most=st.sampled_from([0.3, 0.8]),
)
def test_modegpt_is_refused_if_and_only_if_it_would_fail(
    shape: ModelShape, ratio: int, parts: list[str], multiple: int, most: float
) -> None:
    """Steps that leave a choice, no norms of heads, and the narrowest blocks within the budget, all by hand."""
    method = modegpt.Settings(kind="modegpt", calibration="c", parts=parts, multiple=multiple, most=most)
    rotary = shape.family != "opt"
    full = {"mlp": shape.intermediate, "qk": shape.head_dim, "vo": shape.head_dim}
    steps = {"mlp": multiple, "qk": multiple * (2 if rotary and multiple % 2 else 1), "vo": multiple}
    possible = all(steps[part] < full[part] for part in parts) and not (shape.family == "qwen3" and "qk" in parts)
    if possible:
        widths = dict(full)
        for part in parts:
            target, choices = (1 - most) * full[part], [*range(steps[part], full[part], steps[part]), full[part]]
            below = [width for width in choices if width <= target + 1e-6] or choices[:1]
            nearest = min(choices, key=lambda width: (abs(width - target), -width))
            widths[part] = below[-1] if part == "mlp" else nearest
        least = shape.layers * by_hand(shape, Widths(**widths))
        possible = least <= Budget.of(shape).allowed(ratio)
    assert (not misfits(method, shape, ratio)) == possible


@settings(max_examples=200, deadline=None)
@given(
    shape=shapes(),
    ratio=st.integers(1, 90),
    kept=st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.9]), min_size=1, unique=True),
    block=st.booleans(),
)
def test_asvd_is_refused_if_and_only_if_its_search_would_fail(
    shape: ModelShape, ratio: int, kept: list[float], block: bool
) -> None:
    method = asvd.Settings(kind="asvd", calibration="c", kept=kept, identity_block=block)
    budget = replace(Budget.of(shape), adds_bias=False, identity_block=block)
    ranks = candidate_ranks(budget, kept, ())
    trials = [Trial(name, rank, 1.0 / rank) for name, tried in ranks.items() for rank in tried]
    try:
        cut_trials(trials, budget, ratio)
        possible = True
    except RankwiseError:
        possible = False
    assert (not misfits(method, shape, ratio)) == possible


def study(method: dict[str, Any], ratio: int, *changes: Change, **keys: Any) -> list[str]:
    """What is said of one more method in the quickstart, in a table of its own row, with further keys of that row."""
    row = {"model": "smollm2-135m", "method": "other", "ratio": ratio, **keys}
    added: list[Change] = [(("methods", "other"), method), (("tables", "table_7", "rows", 0), row)]
    return [message for message in errors_of(changed(*added, *changes)) if "methods.other" in message]


ROW = "tables.table_7.rows[0].ratio"
SHAPE = "model 'smollm2-135m'"


@pytest.mark.parametrize(
    ("method", "ratio", "message"),
    [
        (
            {**PRUNED, "skip_first": 4, "skip_last": 20, "sequences": 8},
            30,
            f"{ROW}: removing 30 % is out of reach: pruning 6 of 30 blocks down to 1 key/value head and 8 neurons each "
            f"leaves 81.7 %; remove less, or prune more blocks (`skip_first: 4`, `skip_last: 20`) (`methods.other`, "
            f"{SHAPE})",
        ),
        (
            {**PRUNED, "skip_first": 20, "skip_last": 10},
            20,
            "methods.other.skip_first: llm-pruner: `skip_first: 20` and `skip_last: 10` leave none of 30 blocks to "
            f"prune; lower them ({SHAPE})",
        ),
        (
            {**PRUNED, "own_ratio": 0.999},
            20,
            "methods.other.own_ratio: llm-pruner: `own_ratio: 0.999` leaves 0 of 3 units of the attention branch; "
            f"at least 1 must stay ({SHAPE})",
        ),
        (
            {**PRUNED, "sequences": 33},
            20,
            "methods.other.sequences: `sequences: 33` of `length: 64` are more than the calibration 'c4-32' has (32 of "
            f"256 tokens); calibrate on more, or take fewer ({SHAPE})",
        ),
        (
            {**PRUNED, "length": 300},
            20,
            "methods.other.sequences: `sequences: 10` of `length: 300` are more than the calibration 'c4-32' has (32 "
            f"of 256 tokens); calibrate on more, or take fewer ({SHAPE})",
        ),
        (
            {"kind": "flap", "calibration": "c4-32", "structure": "UL-MM", "remove_heads": 90},
            3,
            "methods.other.remove_heads: flap: `remove_heads: 90` alone removes more than 3 %; remove fewer heads "
            f"({SHAPE})",
        ),
        (
            {"kind": "flap", "calibration": "c4-32", "structure": "AL-MM", "remove_heads": 4},
            20,
            "methods.other.remove_heads: flap: `remove_heads: 4` must be a multiple of 3: query heads go together with "
            f"the key/value head that they share ({SHAPE})",
        ),
        (
            {"kind": "slicegpt", "calibration": "c4-32", "slice": 0.99},
            20,
            f"methods.other.slice: `slice: 0.99` leaves fewer than 8 of 576 channels; cut less ({SHAPE})",
        ),
        (
            {"kind": "modegpt", "calibration": "c4-32", "parts": ["vo"]},
            20,
            f"{ROW}: removing 20 % is out of reach: blocks that lose 80 % of vo leave 90.6 %; remove less, or let them "
            f"lose more (`methods.other`, {SHAPE})",
        ),
        (
            {"kind": "modegpt", "calibration": "c4-32", "multiple": 64},
            20,
            "methods.other.multiple: steps of 64 leave no choice to `qk`, whose width is 64; take a smaller one "
            f"({SHAPE})",
        ),
        (
            {"kind": "asvd", "calibration": "c4-32", "kept": [0.9]},
            20,
            f"{ROW}: removing 20 % is out of reach: the smallest ranks that are tried keep 89.5 %; add smaller ratios "
            f"to `kept`, or remove less (`methods.other`, {SHAPE})",
        ),
    ],
)
def test_it_says_where_why_and_what_to_do(method: dict[str, Any], ratio: int, message: str) -> None:
    assert study(method, ratio) == [message]


def test_a_model_too_small_to_be_pruned_or_sliced_so_far() -> None:
    small = {**BASE["models"]["smollm2-135m"]["shape"], "hidden": 64, "intermediate": 64, "heads": 1, "kv_heads": 1}
    change = (("models", "smollm2-135m", "shape"), small)
    (message,) = study({"kind": "flap", "calibration": "c4-32"}, 50, change)
    assert message == (
        f"{ROW}: removing 50 % is out of reach: pruning 30 of 30 blocks down to 1 key/value head and 8 neurons each "
        f"leaves 62.7 %; remove less (`methods.other`, {SHAPE})"
    )
    (message,) = study({"kind": "slicegpt", "calibration": "c4-32"}, 90, change)
    assert message.startswith(f"{ROW}: SliceGPT cannot remove 90 %: the first layers read"), message
    assert message.endswith(f"remove less (`methods.other`, {SHAPE})")


@pytest.mark.parametrize(
    ("method", "estimator", "ratio", "fits"),
    [
        ({"kind": "afm", "calibration": "c4-32", "covariance": "naive"}, "naive", 73, True),
        ({"kind": "afm", "calibration": "c4-32", "covariance": "naive"}, "naive", 74, False),
        ({"kind": "afm", "calibration": "c4-32", "covariance": "naive"}, "uncentred", 74, True),
        ({"kind": "afm", "calibration": "c4-32", "covariance": "naive"}, "uncentred", 76, False),
        ({"kind": "svd"}, "naive", 74, True),
        ({"kind": "svd", "identity_block": True}, "naive", 76, True),  # rank 8 then holds 56 weights less
    ],
)
def test_reach_is_judged_with_the_form_of_the_pairs(
    method: dict[str, Any], estimator: str, ratio: int, fits: bool
) -> None:
    """All matrices are 64 x 64 here: rank 8 holds a quarter of one, and its bias a sixty-fourth."""
    shape = {"hidden": 64, "intermediate": 64, "heads": 1, "kv_heads": 1}
    small = {**BASE["models"]["smollm2-135m"]["shape"], **shape}
    changes = [(("models", "smollm2-135m", "shape"), small), (("covariance", "naive", "estimator"), estimator)]
    messages = study(method, ratio, *changes, tolerance=20)
    assert [message.split(": ")[1] for message in messages] == ([] if fits else [f"removing {ratio} % is out of reach"])


@pytest.mark.parametrize(
    ("ratio", "keys", "says"),
    [
        (20, {}, None),  # 79.6 % stay
        (20, {"uncompressed": ["gate", "up", "down"]}, None),
        (
            *(30, {"uncompressed": ["gate", "up", "down"]}),
            "with gate, up, down dense nothing would be left of the others; compress more types, or remove less",
        ),
        (30, {"uncompressed": ["gate", "up", "down"], "rounding": "give-back"}, "75.0 % stays"),
    ],
)
def test_reach_is_judged_with_the_rounding_in_force(ratio: int, keys: dict[str, Any], says: str | None) -> None:
    messages = study({"kind": "svd", "rounding": "down", **keys}, ratio)
    assert len(messages) == (says is not None)
    assert says is None or f"removing {ratio} % is out of reach: " in messages[0]
    assert says is None or says in messages[0]


def test_a_magnitude_needs_no_windows() -> None:
    few = (("calibration", "c4-32", "windows"), 9)
    assert study({**PRUNED, "importance": "l1"}, 20, few) == []
    assert study({**PRUNED, "importance": "param_mix"}, 20, few) != []


@pytest.mark.parametrize(
    ("preset", "setting", "read", "unread"),
    [
        ({"kind": "asvd"}, {"allocation": "uniform"}, ("statistics", "tokens"), ("statistics",)),
        ({"kind": "svd-llm", "update": True}, {"update": False}, ("statistics", "tokens"), ("statistics",)),
        *((PRUNED, {"importance": each}, ("tokens",), ()) for each in ("l1", "l2", "random")),
    ],
)
@pytest.mark.parametrize(
    "key", [("kept", [0.5]), ("windows", 8), ("length", 16), ("target", "dense"), ("sequences", 8)]
)
def test_what_a_setting_leaves_unread_is_refused_and_not_waited_for(
    preset: dict[str, Any], setting: dict[str, Any], read: Reads, unread: Reads, key: tuple[str, Any]
) -> None:
    preset = {"calibration": "c4-32", **preset}
    kind = method_modules()[preset["kind"]].Settings
    assert kind.model_validate(preset).needs == read
    assert kind.model_validate(preset | setting).needs == unread
    if key[0] not in kind.model_fields:
        return
    assert study(preset | dict([key]), 20) == []
    (message,) = study(preset | setting | dict([key]), 20)
    assert message.startswith(f"methods.other.{key[0]}: ")
    assert " only; " in message or "reads no windows" in message


def test_gradients_that_are_not_there_are_not_damped() -> None:
    for gradients, says in (("none", 1), ("predict", 0), ("weigh", 0)):
        changes = [(("covariance", "naive", key), value) for key, value in (("gradients", gradients), ("damping", 0.1))]
        messages = [message for message in errors_of(changed(*changes)) if "damping" in message]
        assert messages == ["covariance.naive.damping: says nothing to `gradients: none`; leave it out"][:says]


@pytest.mark.parametrize(
    ("preset", "key"),
    [
        ({"kind": "fwsvd"}, "sequences"),
        ({"kind": "zs-svd"}, "sequences"),
        ({"kind": "obd-llm", "allocation": "first-order"}, "sequences"),
        ({"kind": "aa-svd"}, "windows"),
        ({"kind": "svd-llm", "update": True}, "windows"),
    ],
)
def test_more_windows_than_the_calibration_has_are_refused(preset: dict[str, Any], key: str) -> None:
    assert study({**preset, "calibration": "c4-32", key: 32}, 20) == []
    assert study({**preset, "calibration": "c4-32", key: 33}, 20) == [
        f"methods.other.{key}: 33 windows are more than the calibration 'c4-32' has (32); calibrate on more, or take "
        f"fewer ({SHAPE})"
    ]
    assert study({"kind": "asvd", "calibration": "c4-32", "windows": 33}, 20) == [], "it takes at most so many"


def test_what_two_rows_do_wrong_in_the_same_way_is_said_once() -> None:
    rows = [{"model": "smollm2-135m", "method": "other", "ratio": ratio} for ratio in (20, 30)]
    raw = changed((("methods", "other"), {**PRUNED, "sequences": 33}), (("tables", "table_7", "rows"), rows))
    assert len(errors_of(raw)) == 1


# --- whether the seed decides what comes out ---


@pytest.mark.parametrize(
    ("preset", "random"),
    [
        ({"kind": "dense"}, False),
        ({"kind": "svd"}, False),
        ({"kind": "lord", "calibration": "c4-32", "covariance": "naive"}, False),
        ({"kind": "asvd", "calibration": "c4-32"}, False),
        ({"kind": "asvd", "calibration": "c4-32", "decomposition": "randomised"}, True),
        ({"kind": "flap", "calibration": "c4-32"}, False),
        (PRUNED, False),
        ({**PRUNED, "importance": "random"}, True),
        (BASE["methods"]["bolaco-5x1"], True),
    ],
)
def test_a_method_says_whether_the_seed_decides(preset: dict[str, Any], random: bool) -> None:
    raw = changed((("methods", "other"), preset), (("seeds",), [3, 5, 8]))
    layout = Layout(Study.model_validate(raw))
    assert layout.seeds("other", "none") == ([3, 5, 8] if random else [3])
    assert layout.seeds("other", "scales") == [3, 5, 8]
    files = layout.evaluations("smollm2-135m", "other", 20, "none", "held-out")
    assert [file.split("/")[-2] for file in files] == [f"seed{seed}" for seed in ([3, 5, 8] if random else [3])]
