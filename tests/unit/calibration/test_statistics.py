"""The pass over a model, against hooks on a plain forward pass, for every family; and its resumption."""

from pathlib import Path

import pytest
import torch

from lowrank.calibration import statistics
from lowrank.calibration.statistics import collect_statistics, load_moments
from lowrank.config.presets import Covariance
from lowrank.model.checkpoint import family_of
from tests import tiny

NAIVE = Covariance(estimator="naive")


@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
@pytest.mark.parametrize("layers_per_pass", [1, 2])
def test_statistics_equal_those_of_a_plain_forward_pass(kind: str, layers_per_pass: int, tmp_path: Path) -> None:
    model = tiny.model(kind)
    tokens = torch.randint(2, 400, (5, 24), generator=torch.Generator().manual_seed(1))
    family = family_of(model)
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    handles = []
    for layer in range(tiny.LAYERS):
        for site, linear in family.sites.items():
            module = model.get_submodule(f"{family.blocks}.{layer}.{linear.path}")
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, key=(layer, site): seen.setdefault(key, []).append(args[0].double().flatten(0, -2))
                )
            )
    model(tokens)
    for handle in handles:
        handle.remove()

    statistics.TOKENS_PER_BATCH, before = 48, statistics.TOKENS_PER_BATCH
    try:
        files = collect_statistics(model, tokens, layers_per_pass, tmp_path, torch.device("cpu"), expert_tokens=1)
    finally:
        statistics.TOKENS_PER_BATCH = before
    assert len(files) == tiny.LAYERS
    for layer, file in enumerate(files):
        for site, moments in load_moments(file, family.sites).items():
            inputs = torch.cat(seen[layer, site])
            covariance, mean = moments.estimate(NAIVE)
            expected = torch.cov(inputs.T)
            assert torch.allclose(covariance, expected, atol=1e-5 * float(expected.abs().max())), (layer, site)
            assert torch.allclose(mean, inputs.mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_only_a_pass_is_on_the_device(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a model may be larger than a GPU. (In place of a device stands another type of numbers, as a sign.)"""
    model, seen = tiny.model(kind), []
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}

    def look(model: torch.nn.Module, *arguments: object) -> None:
        seen.append({name for name, tensor in model.named_parameters() if tensor.dtype == torch.float64})

    monkeypatch.setattr(statistics, "_pass", look)
    collect_statistics(model, torch.zeros(1, 4, dtype=torch.long), 1, tmp_path, torch.float64)  # type: ignore[arg-type]
    assert len(seen) == tiny.LAYERS
    blocks, names = family_of(model).blocks, [name for name, _ in model.named_parameters()]
    around = {name for name in names if not name.startswith(f"{blocks}.") and name != "lm_head.weight"}
    assert any("embed_tokens" in name for name in around)
    for layer, found in enumerate(seen):
        assert found == around | {name for name in names if name.startswith(f"{blocks}.{layer}.")}
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before


def test_a_pass_that_was_stopped_goes_on_and_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama-gqa")
    tokens = torch.randint(2, 400, (4, 16), generator=torch.Generator().manual_seed(2))
    whole = collect_statistics(model, tokens, 1, tmp_path / "whole", torch.device("cpu"))

    class Stopped(Exception):
        pass

    original, ran = statistics._run_block, []

    def stop_in_the_second_block(*args: object) -> torch.Tensor:
        ran.append(args[2])
        if args[2] == 1:
            raise Stopped
        return original(*args)

    monkeypatch.setattr(statistics, "_run_block", stop_in_the_second_block)
    with pytest.raises(Stopped):
        collect_statistics(model, tokens, 1, tmp_path / "part", torch.device("cpu"))

    def count(*args: object) -> torch.Tensor:
        ran.append(args[2])
        return original(*args)

    ran.clear()
    monkeypatch.setattr(statistics, "_run_block", count)
    resumed = collect_statistics(model, tokens, 1, tmp_path / "part", torch.device("cpu"))
    assert set(ran) == {1}  # the first block was not run again
    assert [file.read_bytes() for file in resumed] == [file.read_bytes() for file in whole]


def test_what_could_not_be_written_is_not_called_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written beside the computing: the pass ends with their error, and the next try makes them."""
    model, tokens = tiny.model("llama-gqa"), torch.randint(2, 400, (4, 16))
    whole = collect_statistics(model, tokens, 1, tmp_path / "whole", torch.device("cpu"))
    save = statistics.save_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.name == "layer_000.safetensors":
            raise OSError(28, "No space left on device")
        save(path, tensors)

    monkeypatch.setattr(statistics, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        collect_statistics(model, tokens, 1, tmp_path / "other", torch.device("cpu"))
    assert not list((tmp_path / "other").glob("hidden_*/complete.json"))
    monkeypatch.setattr(statistics, "save_tensors", save)
    again = collect_statistics(model, tokens, 1, tmp_path / "other", torch.device("cpu"))
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in whole]
