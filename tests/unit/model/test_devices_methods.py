"""Methods that run a model that lies over several devices: pretended ones, and the same factors as in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.compression import gradient_correction
from lowrank.config.presets import Search
from lowrank.model import devices
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.devices import device_of, devices_of
from lowrank.ranks.budget import Budget, Ranks
from lowrank.search import sliced_model
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.objective import Objective, window_losses
from lowrank.search.sliced_model import open_sliced_model
from tests import pretended, tiny
from tests.unit.model import factor_samples as samples

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("svd-llm", {"update": True}),
    ("svd-llm", {"update": True, "target": "dense"}),
    ("aa-svd", {}),
    ("aa-svd", {"refine": 2, "learning_rate": 3e-3, "batch_size": 4}),
    ("asvd", {"kept": [0.3, 0.6], "windows": 2, "length": 16}),
    ("fwsvd", {}),
    ("zs-svd", {"sequences": 4, "corrections": 1}),
    ("modegpt", {}),
    ("llrc", {"steps": 60, "learning_rate": 0.3, "growth": 0.5, "settle": 5}),
]


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_method_gives_what_it_gives_in_one_piece(
    kind: str, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = samples.statistics(kind, double=True)
    given: dict[str, Any] = {"moments": moments} | settings
    whole, ranks = samples.compressed(method, kind, 30, model=tiny.model(kind).double(), **given)
    with pretended.Pretended() as here:
        for module in (devices, gradient_correction):
            monkeypatch.setattr(module, "pick_devices", lambda: pretended.devices(2))
        model, found = samples.compressed(method, kind, 30, model=tiny.model(kind).double(), **given)
        assert devices_of(model) == [torch.device("cpu")]
    assert set(here.used) == {"lazy:0", "lazy:1"}, here.used
    assert found == ranks
    model.tie_weights()  # a pretended device gives tied modules a parameter each, where a real one moves the data
    for (name, one), (_, other) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6 * max(1.0, float(one.abs().max()))), name


def test_a_search_has_its_bases_beside_their_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.model("llama").save_pretrained(tmp_path)
    bases, settings = samples.bases("llama", "naive"), {"dtype": "float32", "shape": tiny.shape("llama")}
    folder, search = str(bases.files[0].parent), Search(kl_weight=0.5)
    space = SearchSpace(Budget.of(samples.shape_of("llama")), 25, 2, ("v",), lower=0.1)
    ranks: Ranks = space.ranks(space.sample(1, 0)[0])
    windows = samples.TOKENS[:4]
    opened = open_sliced_model(str(tmp_path), folder, settings, 1)
    score = Objective.of(opened.sliced, windows, search, opened.device).evaluate(ranks)
    with pretended.Pretended():
        monkeypatch.setattr(sliced_model, "pick_devices", lambda: pretended.devices(2))
        spread = open_sliced_model(str(tmp_path), folder, settings, 1)
        assert spread.device == pretended.devices(1)[0]
        assert len(devices_of(spread.sliced.model)) == 2
        for layer in spread.sliced.layers.values():
            assert layer.directions.device == layer.projection.device == device_of(layer.dense)
        found = Objective.of(spread.sliced, windows, search, spread.device).evaluate(ranks)
        losses = window_losses(spread.sliced, windows, spread.device)
    for name in ("perplexity", "kl", "objective"):
        assert getattr(found, name) == pytest.approx(getattr(score, name), rel=1e-6), name
    opened.sliced.set_ranks(ranks)
    assert torch.allclose(losses, window_losses(opened.sliced, windows, opened.device), rtol=1e-6)
    assert load_checkpoint(tmp_path, torch.float32).device.type == "cpu"
