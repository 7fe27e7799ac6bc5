"""One model over several devices: pretended ones, which refuse to meet, and the same numbers as in one piece."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lowrank.calibration import output_gradients
from lowrank.calibration.gradients import sum_gradients
from lowrank.calibration.output_gradients import collect_output_gradients, load_output_gradients
from lowrank.compression.influence import block_influence
from lowrank.evaluation.generation import continue_greedily
from lowrank.evaluation.perplexity import evaluate_perplexity
from lowrank.model import devices as devices_module
from lowrank.model.checkpoint import family_of, load_checkpoint
from lowrank.model.devices import device_of, devices_of, moved, pick_devices, spread
from lowrank.model.losses import head_of, last_hidden, token_nll
from lowrank.model.modeling_rankwise import SharedDownLinear
from lowrank.model.partial_forward import input_of, last_hidden_from, on_devices, output_of
from lowrank.model.placement import MODEL_GPUS
from tests import pretended, tiny
from tests.unit.model import factor_samples as samples

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 400, (3, 20), generator=torch.Generator().manual_seed(5))
KINDS = ["llama", "llama-gqa", *tiny.FEW, *tiny.MIXTURES]


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models of five blocks."""
    monkeypatch.setattr(tiny, "LAYERS", 5)
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    monkeypatch.setitem(tiny.MORE, "gemma3_text", tiny.MORE["gemma3_text"] | {"layer_types": types})


def made(kind: str) -> PreTrainedModel:
    """In float64, so that the order of additions shows nowhere."""
    return tiny.model(kind).double()


def spread_model(kind: str, count: int) -> PreTrainedModel:
    model = made(kind)
    return spread(model, family_of(model).blocks, pretended.devices(count))


def losses(model: PreTrainedModel) -> torch.Tensor:
    ids = WINDOWS.to(model.device)
    hidden = last_hidden(model, ids)[:, :-1]
    return token_nll(hidden.flatten(0, 1), head_of(model), ids[:, 1:].flatten())


def test_a_factor_that_blocks_share_may_be_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of devices knows blocks, and nothing of what one of them has of another."""
    model, _ = samples.compressed("basis-sharing", "llama", 30, model=made("llama"))
    shared = [module for module in model.modules() if isinstance(module, SharedDownLinear)]
    whole = losses(model)
    monkeypatch.setattr(devices_module, "placed_blocks", lambda *_: [0, 1])
    with pretended.Pretended() as devices:
        spread(model, family_of(model).blocks, pretended.devices(2))
        parted = [module for module in shared if device_of(module.down) != device_of(module.up)]
        found = losses(model).cpu()
    assert parted
    assert set(devices.used) == {"lazy:0", "lazy:1"}
    assert torch.allclose(found, whole, atol=1e-12)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_piece(kind: str, count: int) -> None:
    whole = losses(made(kind))
    with pretended.Pretended() as devices:
        model = spread_model(kind, count)
        found = losses(model).cpu()
        places = devices_of(model)
        assert len(places) == count or (count == 4 and len(places) == 3)  # two blocks on each of three is the best
        assert {str(place) for place in devices_of(model)} == set(devices.used)
        passed = [move for move in devices.moves if "cpu" not in move]
    assert torch.allclose(found, whole, rtol=0, atol=1e-6)
    assert (str(places[-1]), "lazy:0") in passed  # what leaves the last block comes back


@pytest.mark.usefixtures("deep")
def test_no_device_holds_much_more_than_its_part() -> None:
    with pretended.Pretended() as devices:
        model = spread_model("llama", 3)
        parts = [sum(p.numel() * 8 for p in model.parameters() if p.device == place) for place in devices_of(model)]
        block = sum(p.numel() * 8 for p in model.model.layers[0].parameters())
        assert max(parts) - min(parts) <= block
        assert model.model.embed_tokens.weight.device == model.lm_head.weight.device == model.model.norm.weight.device
        assert sum(parts) == sum(p.numel() * 8 for p in made("llama").parameters())
        assert max(devices.used.values()) < 1.1 * max(parts)  # nothing was copied whole on the way


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("kind", ["llama", "opt", "gemma3_text"])
def test_text_goes_on_as_in_one_piece(kind: str) -> None:
    """Token by token, with keys and values beside their blocks."""
    prompt = WINDOWS[0, :7].tolist()
    whole = continue_greedily(made(kind), prompt, 8, frozenset())
    with pretended.Pretended():
        assert continue_greedily(spread_model(kind, 3), prompt, 8, frozenset()) == whole


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_perplexities_and_influence_are_those_of_one_piece(kind: str) -> None:
    whole = evaluate_perplexity(made(kind), WINDOWS)
    turned = block_influence(made(kind), WINDOWS, CPU)
    with pretended.Pretended():
        found = evaluate_perplexity(spread_model(kind, 3), WINDOWS)
        model = made(kind)
        assert block_influence(model, WINDOWS, pretended.devices(3)) == pytest.approx(turned, abs=1e-6)
        assert devices_of(model) == [CPU]
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("layers_per_pass", [1, 3])
def test_second_moments_of_gradients_are_those_of_one_piece(tmp_path: Path, layers_per_pass: int) -> None:
    types = [linear.name for linear in family_of(made("llama")).types]
    whole = collect_output_gradients(made("llama"), WINDOWS, 5, tmp_path / "whole", CPU)
    with pretended.Pretended():
        model = spread_model("llama", 3)
        files = collect_output_gradients(model, WINDOWS, layers_per_pass, tmp_path / "parts", model.device)
    for one, other in zip(whole, files, strict=True):
        expected, found = load_output_gradients(one, types), load_output_gradients(other, types)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max())), (one, name)


@pytest.mark.usefixtures("deep")
def test_gradients_that_were_stopped_go_on_with_another_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = [linear.name for linear in family_of(made("llama")).types]
    whole = collect_output_gradients(made("llama"), WINDOWS, 5, tmp_path / "whole", CPU)
    plain, calls = output_gradients.backpropagate, []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:  # of the second group of blocks
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(output_gradients, "backpropagate", killed)
    with pretended.Pretended():
        model = spread_model("llama", 2)
        with pytest.raises(KeyboardInterrupt):
            collect_output_gradients(model, WINDOWS, 2, tmp_path / "parts", model.device)
    assert [file.name for file in sorted((tmp_path / "parts").glob("layer*"))] == ["layer_004.safetensors"]
    monkeypatch.setattr(output_gradients, "backpropagate", plain)
    with pretended.Pretended():
        model = spread_model("llama", 3)
        files = collect_output_gradients(model, WINDOWS, 2, tmp_path / "parts", model.device)
    for one, other in zip(whole, files, strict=True):
        expected, found = load_output_gradients(one, types), load_output_gradients(other, types)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max())), (one, name)


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_weights_are_those_of_one_piece_and_the_model_comes_back(squared: bool) -> None:
    names = [f"model.layers.{layer}.{path}" for layer in range(5) for path in ("self_attn.q_proj", "mlp.down_proj")]
    whole = sum_gradients(made("llama"), WINDOWS, names, CPU, squared)
    with pretended.Pretended():
        model = made("llama")
        found = sum_gradients(model, WINDOWS, names, pretended.devices(3), squared)
        assert devices_of(model) == [CPU]
    for name, value in whole.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max())), name
    assert torch.equal(losses(model), losses(made("llama")))


@pytest.mark.usefixtures("deep")
def test_passes_that_begin_at_a_block_are_those_of_one_piece() -> None:
    whole, ids = made("llama"), WINDOWS
    entering = input_of(whole, "model.layers.3", ids, 0, whole.model.embed_tokens(ids))
    with pretended.Pretended():
        model = spread_model("llama", 3)
        here = ids.to(model.device)
        first = model.model.embed_tokens(here)
        found = input_of(model, "model.layers.3", here, 0, first)
        assert found.device == device_of(model.model.layers[3]) != model.device
        assert torch.allclose(found.cpu(), entering, atol=1e-6)
        last = last_hidden_from(model, here, 3, found.to(model.device))
        assert last.device == model.device
        assert torch.allclose(last.cpu(), last_hidden(whole, ids), atol=1e-6)
        left = output_of(model, here, 3, found.cpu().to(model.device))
        assert torch.allclose(left.cpu(), output_of(whole, ids, 3, entering), atol=1e-6)


@pytest.mark.usefixtures("deep")
def test_a_checkpoint_opens_over_several_devices(tmp_path: Path) -> None:
    made("llama-gqa").save_pretrained(tmp_path)
    whole = losses(load_checkpoint(tmp_path, torch.float64))
    with pretended.Pretended():
        model = load_checkpoint(tmp_path, torch.float64, pretended.devices(2))
        assert len(devices_of(model)) == 2
        assert torch.allclose(losses(model).cpu(), whole, atol=1e-6)
        apart = load_checkpoint(tmp_path, torch.float64, pretended.devices(2), beside=10**9)
        places = [str(device_of(block)) for block in apart.model.layers]
        assert places.count("lazy:0") >= 2  # embeddings no longer count for anything


def test_a_model_that_moves_twice_is_moved_between_its_own_devices_only() -> None:
    with pretended.Pretended() as devices:
        model = spread_model("llama", 2)
        first, second = pretended.devices(2)
        with on_devices(made("llama"), [second, first]):
            pass
        spread(model, "model.layers", [second, first])
        assert model.device == second
        spread(model, "model.layers", first)
        devices.moves.clear()
        losses(model)
        assert {move for move in devices.moves if "cpu" not in move} == set()
        assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_a_copied_block_still_belongs_to_its_model() -> None:
    with pretended.Pretended():
        model = spread_model("llama", 2)
        block = copy.deepcopy(model.model.layers[-1])
        assert sum(p.numel() for p in block.parameters()) < sum(p.numel() for p in model.parameters()) / 2
        model.model.layers[-1] = block
        assert torch.allclose(losses(model).cpu(), losses(made("llama")), atol=1e-6)


def test_one_process_of_a_job_takes_all_gpus_that_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.device("cuda")
    monkeypatch.setattr(devices_module, "pick_device", lambda: first)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    both = [torch.device("cuda", index) for index in range(2)]
    for told, expected in (("", [first]), ("1", [first]), ("2", both), ("4", both)):
        monkeypatch.setenv(MODEL_GPUS, told)
        assert pick_devices() == expected
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for processes, expected in ((1, both), (2, [first])):
        monkeypatch.setattr(dist, "get_world_size", lambda processes=processes: processes)
        assert pick_devices() == expected
    monkeypatch.setattr(devices_module, "pick_device", lambda: CPU)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert pick_devices() == [CPU]


def test_what_is_no_tensor_stays_as_it_is() -> None:
    kept = object()
    assert moved({"a": [kept, 3, None], "b": (torch.ones(1),)}, CPU) == {"a": [kept, 3, None], "b": (torch.ones(1),)}


@pytest.mark.usefixtures("deep")
def test_a_device_that_is_too_small_says_so_and_several_are_large_enough() -> None:
    size = sum(p.numel() * 8 for p in made("llama").parameters())
    with pretended.Pretended(room=int(0.8 * size)), pytest.raises(torch.OutOfMemoryError, match="lazy:0 holds"):
        spread_model("llama", 1)
    with pretended.Pretended(room=int(0.8 * size)):
        losses(spread_model("llama", 2))


def test_pretended_devices_refuse_to_meet() -> None:
    with pretended.Pretended(), pytest.raises(AssertionError, match=r"on \['lazy:0', 'lazy:1'\]"):
        torch.ones(2).to("lazy:0") + torch.ones(2).to("lazy:1")
    with pretended.Pretended(), pytest.raises(AssertionError, match=r"on \['cpu', 'lazy:1'\]"):
        torch.ones(2) + torch.ones(2).to("lazy:1")
