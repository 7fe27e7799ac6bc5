"""What removing neurons costs, in files: the numbers of computing in one go, after a kill too; damage is told."""

from __future__ import annotations

import json
import runpy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.compression.branches import Structure
from lowrank.compression.compress import compress_model
from lowrank.compression.eliminate_neurons import Eliminations, NeuronLosses, direction_name, eliminate_neurons
from lowrank.compression.narrow_block import NarrowBlock
from lowrank.compression.neurons import Elimination, Neurons
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, save_tensors, write_json
from lowrank.jobs.state import Parts
from lowrank.manifest import checksums_of
from lowrank.ranks.budget import ALIGNMENT, Budget
from tests import tiny
from tests.unit.methods.rankwise_samples import bases_of
from tests.unit.model import factor_samples as samples
from tests.unit.search.test_search_stage import Named

STAGE = Path(__file__).parents[3] / "workflow_scripts/stages/eliminate_neurons.py"
PRESET = Covariance.model_validate({"estimator": "naive", "gradients": "weigh"})
KINDS = ("llama-gqa", "opt")
KIND, *_ = KINDS


def eliminate(kind: str, folder: Path, multiple: int | None, found: Eliminations | None = None) -> Eliminations:
    """All blocks of a tiny model, into the folder of unfinished work."""
    calibrated = samples.statistics(kind), samples.output_gradients(kind)
    budget, parts = Budget.of(samples.shape_of(kind)), Parts(folder)
    dense = samples.layers_in(tiny.model(kind))
    eliminate_neurons(dense, budget, *calibrated, PRESET, samples.CPU, parts, multiple, found)
    return Eliminations(folder, tiny.LAYERS)


def block_of(kind: str, layer: int) -> NarrowBlock:
    structure = Structure.of(Budget.of(samples.shape_of(kind)))
    moments, gradients = samples.statistics(kind).of(layer), samples.output_gradients(kind).of(layer)
    modules = structure.modules(layer, structure.mlp)
    dense = samples.layers_in(tiny.model(kind))(modules)
    return NarrowBlock(modules, dense, moments, gradients, PRESET, samples.CPU)


class InOneGo(Eliminations):
    """The same without files: each number is computed when it is asked for."""

    def __init__(self, kind: str) -> None:
        self.kind, self.asked = kind, 0

    def of(self, layer: int) -> NeuronLosses:
        block, asked = block_of(self.kind, layer), self

        class Computed(NeuronLosses):
            def of(self, neurons: int, type_name: str) -> torch.Tensor:
                asked.asked += 1
                kept = self.elimination.kept(neurons)
                (part,) = [part for part in block.parts(kept) if part.module.type.name == type_name]
                losses = block.basis(part, kept).losses
                assert losses is not None
                return losses

        return Computed(block.neurons.eliminate(), {}, Path("nowhere"))


class Calls:
    """Counts eliminations; may be killed at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> None:
        self.count, self.kill_at, self.eliminate = 0, kill_at, Neurons.eliminate
        monkeypatch.setattr(Neurons, "eliminate", lambda neurons: self.call(neurons))

    def call(self, neurons: Neurons) -> Elimination:
        self.count += 1
        if self.count == self.kill_at:
            raise KeyboardInterrupt
        return self.eliminate(neurons)


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_elimination_and_what_is_left_out_of_narrower_matrices(kind: str, tmp_path: Path) -> None:
    """By the eigenvalues of M W C W' M', in numpy, where the matrix is one of rows; M'M = G + eps diag(G)."""
    found = eliminate(kind, tmp_path, 16)
    structure = Structure.of(Budget.of(samples.shape_of(kind)))
    widths = structure.mlp.tried(16)
    assert len(widths) > 1
    for layer in range(tiny.LAYERS):
        block, stored = block_of(kind, layer), found.of(layer)
        expected = block.neurons.eliminate()
        assert torch.equal(stored.elimination.order, expected.order)
        assert torch.equal(stored.elimination.losses, expected.losses)
        first, last = block.modules[0], block.modules[-1]
        wanted = {direction_name(width, module.type.name) for width in widths for module in block.modules}
        assert stored.directions.keys() == wanted
        weight = tiny.model(kind).get_submodule(first.name).weight.double().numpy()
        covariance = samples.statistics(kind).of(layer)[first.type.site].estimate(PRESET)[0].double().numpy()
        gradient = samples.output_gradients(kind).of(layer)[first.type.name].double().numpy()
        for width in widths:
            kept = expected.kept(width).numpy()
            g = gradient[np.ix_(kept, kept)]
            damped = g + PRESET.damping * np.diag(np.diag(g))
            values = np.sort(np.linalg.eigvals(damped @ weight[kept] @ covariance @ weight[kept].T).real)[::-1] / 2
            losses = stored.of(width, first.type.name).numpy()
            assert np.allclose(losses, values[: len(losses)], rtol=1e-4, atol=1e-9 * values[0])
            assert len(stored.of(width, last.type.name)) == min(width, samples.shape_of(kind).hidden)


@pytest.mark.parametrize("mlp", ["neurons", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_from_files_is_that_of_computing_in_one_go(kind: str, mlp: str, tmp_path: Path) -> None:
    """Bit by bit, at three ratios from one elimination."""
    settings: dict[str, Any] = {"kind": "rankwise", "calibration": "c", "covariance": "c", "mlp": mlp}
    files = eliminate(kind, tmp_path, ALIGNMENT if mlp == "both" else None)
    in_one_go, bases = InOneGo(kind), bases_of(tiny.model(kind), kind, samples.TOKENS, PRESET)
    for ratio in (15, 35, 60):
        made: list[tuple[Any, dict[str, Any]]] = []
        for eliminations in (files, in_one_go):
            model, account = tiny.model(kind), dict[str, Any]()
            task = {
                "model": model,
                "budget": Budget.of(samples.shape_of(kind)),
                "ratio": ratio,
                "seed": 0,
                "bases": bases,
                "statistics": samples.statistics(kind),
                "gradients": samples.output_gradients(kind),
                "covariance": PRESET,
                "eliminations": eliminations,
                "tokens": samples.TOKENS,
                "account": account,
            }
            compress_model("rankwise", settings, task)
            made.append((model.state_dict(), account))
        (weights, said), (others, said_too) = made
        assert said == said_too
        assert min(said["neurons"]["kept"]) < tiny.INTERMEDIATE
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert bool(in_one_go.asked) == (mlp == "both")


def test_pairs_take_an_elimination_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = eliminate(KIND, tmp_path / "whole", 16)
    plain = eliminate(KIND, tmp_path / "plain", None)
    assert not plain.of(0).directions
    calls = Calls(monkeypatch)
    eliminate(KIND, tmp_path / "continued", 16, plain)
    assert calls.count == 0
    assert whole.of(0).directions
    assert checksums_of(tmp_path / "continued").items() >= layers_of(tmp_path / "whole").items()


def layers_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums_of(folder).items() if name.startswith("layer_")}


@pytest.mark.parametrize("kill_at", range(1, tiny.LAYERS + 1))
def test_a_kill_loses_one_block_at_most(kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eliminate(KIND, tmp_path / "whole", ALIGNMENT)
    with monkeypatch.context() as patch:
        killed = Calls(patch, kill_at)
        with pytest.raises(KeyboardInterrupt):
            eliminate(KIND, tmp_path / "killed", ALIGNMENT)
    assert len(layers_of(tmp_path / "killed") if (tmp_path / "killed").is_dir() else {}) == kill_at - 1
    again = Calls(monkeypatch)
    eliminate(KIND, tmp_path / "killed", ALIGNMENT)
    assert killed.count + again.count == tiny.LAYERS + 1
    assert layers_of(tmp_path / "killed") == layers_of(tmp_path / "whole")


def test_a_number_that_was_not_tried_and_damage_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "layers"
    found = eliminate(KIND, folder, None)
    with pytest.raises(RankwiseError, match=r"layer_001.safetensors: holds nothing of 'up' with 80 neurons.*Delete"):
        found.of(1).of(80, "up")
    write_json(tmp_path / "manifest.json", {"layers": layers_of(folder)})
    found.of(1)
    tensors = load_tensors(folder / "layer_001.safetensors")
    save_tensors(folder / "layer_001.safetensors", tensors | {"losses": tensors["losses"] + 1})
    with pytest.raises(RankwiseError, match=r"layer_001.safetensors: damaged or replaced"):
        found.of(1)


# --- the stage ---


class Job:
    """The job of the rule, on a tiny model."""

    def __init__(self, folder: Path) -> None:
        tiny.model(KIND).save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        write_json(folder / "manifest-of-inputs.json", {})
        self.folder = folder

    def run(self, name: str, multiple: int | None = None, **inputs: str) -> dict[str, Any]:
        """Run the stage; returns the manifest."""
        named = {"model": "tiny", "calibration": "c", "covariance": "fisher", "multiple": str(multiple or "any")}
        settings = {"dtype": "float32", "shape": tiny.shape(KIND), "covariance": PRESET.plain(), "multiple": multiple}
        output = Named(layers=str(self.folder / name / "layers"), manifest=str(self.folder / name / "manifest.json"))
        job = Named(
            **{"rule": "eliminate_neurons", "threads": 1, "log": [], "resources": {}, "output": output},
            input=Named(**self._inputs, **inputs),
            wildcards=Named(**named),
            params=Named(settings=settings | {"state": str(self.folder / "state")}),
        )
        runpy.run_path(str(STAGE), init_globals={"snakemake": job})
        manifest: dict[str, Any] = json.loads(Path(output.manifest).read_text())
        return manifest

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return {
            "model": str(self.folder / "model"),
            "statistics": str(samples.statistics(KIND).folder),
            "gradients": str(samples.output_gradients(KIND).folder),
            "gradients_manifest": str(self.folder / "manifest-of-inputs.json"),
        }


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_stage_says_what_it_has_made(job: Job) -> None:
    plain = job.run("any")
    pairs = job.run("8", 8, neurons=str(job.folder / "any/layers"))
    assert (plain["multiple"], pairs["multiple"]) == (None, 8)
    for name, manifest in (("any", plain), ("8", pairs)):
        assert manifest["layers"] == checksums_of(job.folder / name / "layers")
        assert manifest["covariance"] == PRESET.plain()
        assert manifest["seconds"] > 0
    assert not list((job.folder / "state").iterdir())
    eliminate(KIND, job.folder / "again", 8)
    assert pairs["layers"] == layers_of(job.folder / "again")


def test_the_stage_goes_on_where_it_was_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job.run("whole")["layers"]
    with monkeypatch.context() as patch:
        Calls(patch, tiny.LAYERS)
        with pytest.raises(KeyboardInterrupt):
            job.run("killed")
    assert not (job.folder / "killed/layers").exists()
    again = Calls(monkeypatch)
    assert job.run("killed")["layers"] == whole
    assert again.count == 1
    assert not list((job.folder / "state").iterdir())
