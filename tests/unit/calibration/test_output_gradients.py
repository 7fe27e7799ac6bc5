"""Second moments of output gradients against autograd, token by token; interrupted passes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.calibration import gradients, output_gradients
from lowrank.calibration.output_gradients import collect_output_gradients, collect_share, load_output_gradients
from lowrank.errors import RankwiseError
from lowrank.files import save_tensors
from lowrank.jobs.share import ALONE
from lowrank.jobs.state import SECONDS, Clock
from lowrank.model import losses
from lowrank.model.checkpoint import family_of
from tests import tiny

CPU = torch.device("cpu")


def some_tokens(windows: int = 5, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(3))


def by_autograd(model: PreTrainedModel, tokens: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """sum over tokens of g g' / predictions, with the loss as transformers computes it, a window at a time."""
    family, outputs = family_of(model), {}
    handles = []
    for layer in range(tiny.LAYERS):
        for linear in family.types:

            def keep(
                module: object, args: object, y: torch.Tensor, key: tuple[int, str] = (layer, linear.name)
            ) -> None:
                outputs[key] = y

            module = model.get_submodule(f"{family.blocks}.{layer}.{linear.path}")
            handles.append(module.register_forward_hook(keep))
    sums: dict[tuple[int, str], torch.Tensor] = {}
    model.requires_grad_(True)
    for ids in tokens:
        total = model(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
        gradients = torch.autograd.grad(total, list(outputs.values()))
        for key, gradient in zip(outputs, gradients, strict=True):
            for g in gradient.flatten(0, -2):
                sums[key] = sums.get(key, 0) + torch.outer(g, g)
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return {key: total / (len(tokens) * (tokens.shape[1] - 1)) for key, total in sums.items()}


def fisher_by_enumeration(model: PreTrainedModel, tokens: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """sum over positions and all next tokens v of p(v) g_v g_v' / predictions: the Fisher information."""
    family, outputs = family_of(model), {}
    handles = []
    for layer in range(tiny.LAYERS):
        for linear in family.types:
            module = model.get_submodule(f"{family.blocks}.{layer}.{linear.path}")
            key = (layer, linear.name)
            handles.append(module.register_forward_hook(lambda _, args, y, key=key: outputs.__setitem__(key, y)))
    sums: dict[tuple[int, str], torch.Tensor] = {}
    model.requires_grad_(True)
    for ids in tokens:
        log_p = functional.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
        for position in log_p:
            for one in position:
                found = torch.autograd.grad(one, list(outputs.values()), retain_graph=True)
                for key, gradient in zip(outputs, found, strict=True):
                    g = gradient.flatten(0, -2)
                    sums[key] = sums.get(key, 0) + one.exp().detach() * (g.T @ g)
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return {key: total / (len(tokens) * (tokens.shape[1] - 1)) for key, total in sums.items()}


def stored(files: list[Path], model: PreTrainedModel) -> dict[tuple[int, str], torch.Tensor]:
    names = [linear.name for linear in family_of(model).types]
    return {(i, name): g for i, file in enumerate(files) for name, g in load_output_gradients(file, names).items()}


@pytest.mark.parametrize("kind", tiny.SHAPES)
@pytest.mark.parametrize(("layers_per_pass", "batch"), [(1, 512), (2, 1), (8, 18)])
def test_every_layer_equals_the_sum_over_tokens(
    kind: str, layers_per_pass: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny.model(kind).double(), some_tokens()
    expected = by_autograd(model, tokens)
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 3)  # several chunks a window, and some across two of them
    monkeypatch.setattr(output_gradients, "TOKENS_PER_BATCH", batch)
    found = stored(collect_output_gradients(model, tokens, layers_per_pass, tmp_path, CPU), model)
    assert found.keys() == expected.keys()
    for key, g in found.items():
        size = float(expected[key].abs().max())
        assert size > 0
        assert g.dtype == torch.float32
        assert torch.equal(g, g.T)
        assert torch.allclose(g.double(), expected[key], rtol=1e-6, atol=1e-7 * size), key  # rounded to float32 once


@pytest.mark.slow
def test_draws_of_the_models_predictions_come_near_the_fisher_information(tmp_path: Path) -> None:
    model, tokens = tiny.model("llama-gqa"), some_tokens(1, 4)
    exact = fisher_by_enumeration(model, tokens)
    far = {}
    for draws in (4, 64, 512):
        files = collect_output_gradients(model, tokens, 2, tmp_path / str(draws), CPU, draws=draws)
        found = stored(files, model)
        far[draws] = max(float((g - exact[key]).norm() / exact[key].norm()) for key, g in found.items())
    assert far[512] < 0.3
    assert far[512] < far[64] / 2 < far[4] / 4


def test_what_is_drawn_takes_the_place_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny.model("llama").double(), some_tokens()
    monkeypatch.setattr(output_gradients, "TOKENS_PER_BATCH", 1)
    expected = stored(collect_output_gradients(model, tokens, 2, tmp_path / "text", CPU), model)
    texts = iter([window[1:] for window in tokens for _ in range(3)])
    monkeypatch.setattr(gradients, "draw_tokens", lambda states, head, draw: next(texts))
    for key, g in stored(collect_output_gradients(model, tokens, 2, tmp_path / "drawn", CPU, draws=3), model).items():
        assert torch.allclose(g, expected[key], rtol=1e-5, atol=1e-8), key


def test_each_batch_draws_other_tokens_and_each_pass_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, drawn = tiny.model("llama"), some_tokens(1).repeat(4, 1), []
    monkeypatch.setattr(output_gradients, "TOKENS_PER_BATCH", 1)  # four batches, all of one window
    plain = gradients.draw_tokens

    def seen(*arguments: Any) -> torch.Tensor:
        drawn.append(tuple(plain(*arguments).tolist()))
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(gradients, "draw_tokens", seen)
    collect_output_gradients(model, tokens, 1, tmp_path, CPU, draws=2)
    assert len(drawn) == 2 * 4 * 2
    assert drawn[:8] == drawn[8:]
    assert len(set(drawn)) == 8


def test_narrow_models_are_accumulated_in_more_digits_and_near(tmp_path: Path) -> None:
    tokens, wide = some_tokens(), tiny.model("llama-gqa")
    exact = stored(collect_output_gradients(wide, tokens, 2, tmp_path / "wide", CPU), wide)
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.model("llama-gqa").to(dtype)
        for key, g in stored(collect_output_gradients(model, tokens, 2, tmp_path / str(dtype), CPU), model).items():
            assert g.dtype == torch.float32
            assert torch.linalg.norm(g - exact[key]) < 0.1 * torch.linalg.norm(exact[key])


def test_products_of_16_bits_are_those_of_the_same_numbers_in_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs form them: nothing is lost on the way into them."""
    model, tokens, asked = tiny.model("llama-gqa").bfloat16(), some_tokens(), []
    expected = stored(collect_output_gradients(model, tokens, 2, tmp_path / "wide", CPU), model)
    monkeypatch.setattr(output_gradients, "prefers_parts", lambda like: asked.append(like.dtype) or True)
    found = stored(collect_output_gradients(model, tokens, 2, tmp_path / "halves", CPU), model)
    assert set(asked) == {torch.bfloat16}
    for key, g in found.items():
        assert torch.allclose(g, expected[key], rtol=1e-5, atol=1e-6 * float(expected[key].abs().max()))


@pytest.mark.parametrize("draws", [None, 2])
def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    draws: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny.model("llama"), some_tokens()
    monkeypatch.setattr(output_gradients, "TOKENS_PER_BATCH", 18)  # three batches
    whole = collect_output_gradients(model, tokens, 1, tmp_path / "whole", CPU, draws=draws)
    plain, calls = output_gradients.backpropagate, []

    def killed(model: PreTrainedModel, ids: torch.Tensor, *drawing: Any) -> None:
        calls.append(ids)
        if len(calls) == 5:  # the last block is finished, the first is not
            raise KeyboardInterrupt
        plain(model, ids, *drawing)

    monkeypatch.setattr(output_gradients, "backpropagate", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_output_gradients(model, tokens, 1, tmp_path / "cut", CPU, draws=draws)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [whole[1].name]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    resumed = collect_output_gradients(model, tokens, 1, tmp_path / "cut", CPU, draws=draws)
    assert len(calls) == 5 + 3
    for one, other in zip(whole, resumed, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_kill_between_the_files_of_a_group_leaves_it_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, written = tiny.model("llama"), some_tokens(), []
    whole = collect_output_gradients(model, tokens, 2, tmp_path / "whole", CPU)

    def killed(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_tensors(path, tensors)

    monkeypatch.setattr(output_gradients, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_output_gradients(model, tokens, 2, tmp_path / "cut", CPU)
    assert list((tmp_path / "cut").iterdir()) == written
    monkeypatch.undo()
    resumed = collect_output_gradients(model, tokens, 2, tmp_path / "cut", CPU)
    assert [path.read_bytes() for path in resumed] == [path.read_bytes() for path in whole]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a process is told of a tiny model and `some_tokens`."""
    tiny.model("llama").save_pretrained(tmp_path / "model")
    save_tensors(tmp_path / "tokens.safetensors", {"tokens": some_tokens().int()})
    monkeypatch.setattr(output_gradients, "pick_devices", lambda: [CPU])
    files = {"model": str(tmp_path / "model"), "tokens": str(tmp_path / "tokens.safetensors")}
    return files | {
        "dtype": "float32",
        "layers_per_pass": 1,
        "windows": 3,
        "draws": 2,
        "state": str(tmp_path / "found"),
    }


def test_the_time_before_a_kill_counts(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def passed(*arguments: Any) -> None:
        passes.append(0)
        if len(passes) > 3:  # in the group after the first
            raise KeyboardInterrupt
        gradients.backpropagate(*arguments)

    monkeypatch.setattr(output_gradients, "backpropagate", passed)
    monkeypatch.setattr(output_gradients, "TOKENS_PER_BATCH", 9)
    clock = Clock(Path(job["state"]) / SECONDS)
    with pytest.raises(KeyboardInterrupt):
        collect_share(job, ALONE)
    assert 0 < Clock(clock.path).before <= clock.seconds


def test_a_process_reads_as_many_windows_and_draws_as_its_job_says(tmp_path: Path, job: dict[str, Any]) -> None:
    model, tokens = tiny.model("llama"), some_tokens()
    collect_share(job, ALONE)
    asked = {"found": (tokens[:3], 2), "of the text": (tokens[:3], None), "of all windows": (tokens, 2)}
    expected = {
        name: collect_output_gradients(model, windows, 1, tmp_path / f"expected {name}", CPU, draws=draws)
        for name, (windows, draws) in asked.items()
    }
    for layer, file in enumerate(expected["found"]):
        found = (tmp_path / "found" / file.name).read_bytes()
        assert [name for name, files in expected.items() if files[layer].read_bytes() == found] == ["found"]


def test_a_backward_pass_goes_no_deeper_than_its_blocks(tmp_path: Path) -> None:
    model, tokens, reached = tiny.model("llama"), some_tokens(1), []

    def seen(module: object, args: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            reached.append(module)

    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(seen)
    collect_output_gradients(model, tokens, 1, tmp_path, CPU)
    assert len(reached) == 1  # in the second pass, which is for the first block
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_damage_names_the_layer_where_it_begins_and_writes_nothing(tmp_path: Path) -> None:
    model = tiny.model("llama")

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: Poison.apply(output))
    with pytest.raises(RankwiseError, match=r"model\.layers\.0\.mlp\.down_proj: the gradient at its output is not fin"):
        collect_output_gradients(model, some_tokens(), 2, tmp_path, CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_and_windows_of_one_token_are_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with pytest.raises(RankwiseError, match="windows of two tokens or more, not of 1"):
        collect_output_gradients(model, some_tokens(length=1), 2, tmp_path, CPU)
    model.lm_head.weight.data[:] = float("nan")
    for draws in (None, 2):
        with pytest.raises(RankwiseError, match="the loss of a calibration window is not finite"):
            collect_output_gradients(model, some_tokens(), 2, tmp_path, CPU, draws=draws)
