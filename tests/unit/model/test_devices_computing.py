"""Methods that leave a model in main memory and compute on a GPU: a pretended one, and the same factors as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.bases.block import bases_of_block, linears_of
from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import load_output_gradients
from lowrank.calibration.routing import about_experts
from lowrank.calibration.statistics import load_moments
from lowrank.compression import compress, gradient_correction, narrower, stacks
from lowrank.compression.eliminate_neurons import Eliminations, eliminate_neurons
from lowrank.config.presets import Covariance
from lowrank.files import layer_name, save_tensors
from lowrank.jobs.state import Parts
from lowrank.model import devices, runtime
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import devices_of
from lowrank.ranks.budget import Budget
from tests import pretended, tiny
from tests.unit.model import factor_samples as samples

COVARIANCE = Covariance(estimator="pooled", groups=4, gradients="weigh")
RANKWISE = {"covariance": "fisher", "influence": False}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}),
    ("svd", {"identity_block": True}),
    ("skipcat", {}),
    ("svd-llm", {}),
    ("obd-llm", {}),
    ("obd-llm", {"allocation": "first-order", "sequences": 2}),
    ("zs-svd", {"sequences": 2}),
    ("rankwise", {**RANKWISE, "mlp": "pairs"}),
    ("afm", {"covariance": "fisher", "identity_block": True}),
]
NOT_OF_EXPERTS: list[tuple[str, dict[str, Any]]] = [
    ("basis-sharing", {}),
    ("slicegpt", {}),
    ("flap", {}),
    ("llm-pruner", {"skip_first": 0, "skip_last": 0, "sequences": 2, "length": 16, "importance": "param_mix"}),
    ("modegpt", {"parts": ["mlp", "vo"]}),
    ("llrc", {"steps": 40, "learning_rate": 0.3, "growth": 0.5, "settle": 2}),
    ("rankwise", {**RANKWISE, "mlp": "neurons"}),
    ("rankwise", {**RANKWISE, "mlp": "both"}),
    ("rankwise", {**RANKWISE, "mlp": "neurons", "widths": "one"}),
]
CASES = [
    pytest.param(kind, method, settings, id="-".join((kind, method, *map(str, settings.values()))))
    for kind in ("llama-gqa", "opt", "qwen3_moe")
    for method, settings in (METHODS if kind == "qwen3_moe" else METHODS + NOT_OF_EXPERTS)
    if (kind, method) != ("opt", "slicegpt")  # whose stream cannot be rotated
]
ON_DEVICE = torch.device(pretended.TYPE, 0)


@pytest.fixture
def computing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that would compute on the first GPU computes on a pretended one."""
    for module in (runtime, compress, narrower, devices):
        monkeypatch.setattr(module, "pick_device", lambda: ON_DEVICE)
    for module in (devices, gradient_correction):
        monkeypatch.setattr(module, "pick_devices", lambda: [ON_DEVICE])


def bases_in(folder: Path, kind: str, device: torch.device) -> Bases:
    """Bases of a tiny model by statistics and gradients, computed on a device."""
    folder.mkdir()
    model, of_files = tiny.model(kind), samples.statistics(kind, double=True)
    family, gradients = family_of(model), samples.output_gradients(kind)
    for layer in range(tiny.LAYERS):
        file = Path(of_files.folder) / layer_name(layer)
        moments = load_moments(file, family.sites)
        linears = linears_of(model.get_submodule(f"{family.blocks}.{layer}"), family, moments)
        weights = load_output_gradients(Path(gradients.folder) / layer_name(layer), linears)
        stored = bases_of_block(linears, moments, COVARIANCE, device, "block", weights)
        save_tensors(folder / layer_name(layer), stored | about_experts(file, family))
    return Bases(folder, tiny.LAYERS)


def eliminated_in(folder: Path, kind: str, multiple: int | None, device: torch.device) -> Eliminations:
    folder.mkdir()
    dense = samples.layers_in(tiny.model(kind))
    budget = Budget.of(samples.shape_of(kind))
    moments, gradients = samples.statistics(kind, double=True), samples.output_gradients(kind)
    eliminate_neurons(dense, budget, moments, gradients, COVARIANCE, device, Parts(folder), multiple)
    return Eliminations(folder, tiny.LAYERS)


def read_by(method: str, kind: str, settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    """The bases and eliminations that a preset reads, computed on a device."""
    folder.mkdir()
    read: dict[str, Any] = {}
    if method in ("rankwise", "afm"):
        read |= {"bases": bases_in(folder / "bases", kind, device), "covariance": COVARIANCE}
    if (mlp := settings.get("mlp", "pairs")) != "pairs":
        read["eliminations"] = eliminated_in(folder / "neurons", kind, 8 if mlp == "both" else None, device)
    return read


def compressed(method: str, kind: str, settings: dict[str, Any], read: dict[str, Any]) -> Any:
    """A tiny model in float64 after a method, and its ranks."""
    model = tiny.model(kind).double()
    task: dict[str, Any] = {
        "model": model,
        "budget": Budget.of(samples.shape_of(kind)),
        "ratio": 30,
        "seed": 0,
        "statistics": samples.statistics(kind, double=True),
        "tokens": samples.TOKENS,
        "gradients": samples.output_gradients(kind),
        "account": {},
        "parts": None,
    }
    preset = {"kind": method} | ({} if method == "svd" else {"calibration": "c"}) | settings
    return model, compress.compress_model(method, preset, task | read)


@pytest.mark.parametrize(("kind", "method", "settings"), CASES)
def test_a_method_that_computes_on_a_gpu_gives_what_it_gives_without(
    kind: str,
    method: str,
    settings: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What bounds the entries of its block indexes by a list, of which torch makes a tensor that a pretended device does
    # not see.
    monkeypatch.setattr(stacks, "BOUND", 1e9)
    here = read_by(method, kind, settings, tmp_path / "here", torch.device("cpu"))
    whole, ranks = compressed(method, kind, settings, here)
    request.getfixturevalue("computing_elsewhere")
    with pretended.Pretended():
        read = read_by(method, kind, settings, tmp_path / "there", ON_DEVICE)
    with pretended.Pretended() as there:
        model, found = compressed(method, kind, settings, read)
        assert devices_of(model) == [torch.device("cpu")]
    assert bool(there.used) == (method != "flap")
    assert found == ranks
    model.tie_weights()
    for (name, one), (_, other) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6 * max(1.0, float(one.abs().max()))), name
