"""What the check says of presets with gradients, and of figures that put predicted losses to the test."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.config.load import check_study
from lowrank.layout import Layout
from tests.config.wrong import GONE, Change, changed, errors_of

FIGURE = {
    "kind": "predicted-loss",
    "title": "Predicted and measured",
    "model": "smollm2-135m",
    "calibration": "c4-32",
    "covariance": ["fisher"],
    "corpus": "wikipedia-validation",
    "windows": 2,
    "length": 256,
}
FISHER = {"estimator": "naive", "gradients": "weigh"}
METHOD = {"kind": "rankwise", "calibration": "c4-32", "covariance": "fisher"}


def study(*changes: Change) -> dict[str, Any]:
    """The config with such a figure, a method that uses the same bases, and further changes."""
    added: list[Change] = [
        (("covariance", "fisher"), FISHER),
        (("figures", "prediction"), FIGURE),
        (("methods", "ours"), METHOD),
    ]
    return changed(*added, *changes)


def test_the_figure_is_accepted_and_reads_one_result_a_covariance() -> None:
    raw = study(
        (("covariance", "pca"), FISHER | {"gradients": "predict"}),
        (("figures", "prediction", "covariance"), ["fisher", "pca"]),
    )
    assert errors_of(raw) == []
    layout = Layout(check_study(raw, "test"))
    files = [f"results/checked/truncations/prediction/{name}.json" for name in ("fisher", "pca")]
    assert layout.figure_inputs("prediction") == files
    assert set(files) <= set(layout.evidence())
    assert layout.used_models() == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", "zzz", "model: 'zzz' is not in `models` (there is: smollm2-135m)"),
        ("calibration", "zzz", "calibration: 'zzz' is not in `calibration` (there is: c4-32)"),
        ("covariance", ["fishr"], "covariance[0]: 'fishr' is not in `covariance` - did you mean 'fisher'?"),
        ("corpus", "c4-tests", "corpus: 'c4-tests' is not in `corpora` - did you mean 'c4-test'?"),
        ("length", 4096, "length: 4096 tokens, more than the `max_length` of model 'smollm2-135m' (2048)"),
        (
            *("covariance", ["fisher", "naive"]),
            "covariance[1]: 'naive' has `gradients: none`, so it predicts no loss; write `gradients: weigh` (or "
            "`predict`) there",
        ),
        (
            *("corpus", "c4-calibration"),
            "corpus: 'c4-calibration' shares documents with 'c4-calibration', which calibration.c4-32 uses; "
            "predictions are to be tested on other text",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(key: str, value: Any, says: str) -> None:
    assert errors_of(study((("figures", "prediction", key), value))) == [f"figures.prediction.{says}"]


def test_the_figure_needs_its_keys() -> None:
    (message,) = errors_of(study((("figures", "prediction", "corpus"), GONE)))
    assert message.startswith("figures.prediction.corpus: missing")


def test_groups_of_a_figures_covariance_are_counted() -> None:
    pooled = {"estimator": "pooled", "groups": 64, "gradients": "weigh"}
    messages = errors_of(study((("covariance", "fisher"), pooled)))
    assert "figures.prediction.covariance: 'fisher' pools 64 groups, but 'c4-32' has only 32 windows" in messages[1]
    assert len(messages) == 2  # the method's, and the figure's


def test_a_method_that_allocates_by_predicted_loss_needs_bases_that_predict_it() -> None:
    (message,) = errors_of(study((("methods", "ours", "covariance"), "naive")))
    assert message == (
        "methods.ours.covariance: 'naive' has `gradients: none`, and 'rankwise' allocates by the loss that they "
        "predict; write `gradients: weigh` (or `predict`) there"
    )


def test_gradients_are_collected_on_windows_that_are_there() -> None:
    (message,) = errors_of(study((("calibration", "c4-32", "gradient_windows"), 33)))
    assert message == "calibration.c4-32.gradient_windows: 33 is more than `windows: 32`"


def test_identity_blocks_need_all_directions() -> None:
    block = (("methods", "lord", "identity_block"), True)
    (message,) = errors_of(changed(block))
    assert message == (
        "methods.lord.identity_block: 'naive' holds directions up to the break-even rank of plain pairs only; write "
        "`directions: all` there"
    )
    assert errors_of(changed(block, (("covariance", "naive", "directions"), "all"))) == []
    assert errors_of(changed(block, (("covariance", "naive", "gradients"), "predict"))) == []
    down = (("methods", "lord", "rounding"), "down")
    (message,) = errors_of(changed(block, down, (("covariance", "naive", "directions"), "all")))
    assert message == "methods.lord.identity_block: the published ranks (`rounding: down`) are those of plain pairs"
    (message,) = errors_of(changed((("methods", "svd"), {"kind": "svd", "identity_block": True, "rounding": "down"})))
    assert message == "methods.svd.identity_block: the published ranks (`rounding: down`) are those of plain pairs"
    searched = {"kind": "asvd", "calibration": "c4-32", "identity_block": True, "rounding": "down"}
    assert errors_of(changed((("methods", "svd"), searched))) == []  # the ranks that its search tries
    (message,) = errors_of(changed((("methods", "svd"), searched | {"allocation": "uniform"})))
    assert message.startswith("methods.svd.identity_block: the published ranks")
    (message,) = errors_of(changed((("methods", "dense", "identity_block"), True)))
    assert message.startswith("methods.dense.identity_block: unknown key")
