"""The distillation of a whole checkpoint: what it brings, how it goes on after a stop, what it writes."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.files import read_json, save_tensors, sha256_file
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import load_checkpoint, replace_modules, save_checkpoint
from lowrank.model.devices import device_of
from lowrank.model.factors import LowRankFactors
from lowrank.post_training import distil
from lowrank.post_training.distil import distil_checkpoint, distil_model
from tests import pretended
from tests.unit.post_training.post_training_samples import write_manifest
from tests.unit.post_training.test_distillation import halves, preset
from tests.unit.post_training.test_launch import a_tokenizer

SUBJECT = {"model": "tiny", "method": "svd", "ratio": 20, "tuning": "distilled", "seed": 0}


def sequences(count: int, seed: int) -> torch.Tensor:
    """Windows of 16 tokens that count on by one, two or three."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (count, 1), generator=generator)
    return (start + torch.randint(1, 4, (count, 1), generator=generator) * torch.arange(16)) % 64


def loss_of(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean loss of the next token."""
    logits = model(windows).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits.float(), windows[:, 1:].flatten())


@cache
def trained_weights() -> dict[str, torch.Tensor]:
    """Of a model of three blocks that has learnt to count."""
    torch.manual_seed(0)
    model = a_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        optimiser.zero_grad()
        loss_of(model, sequences(32, seed=step)).backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def a_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def dense_model() -> LlamaForCausalLM:
    model = a_model()
    model.load_state_dict(trained_weights())
    return model.requires_grad_(False)


def compressed_model() -> LlamaForCausalLM:
    """Pairs of rank 10 by plain SVD in the first and the last block; the second stays dense."""
    model, replacements = dense_model(), {}
    for name, module in model.named_modules():
        if name.startswith(("model.layers.0.", "model.layers.2.")) and isinstance(module, torch.nn.Linear):
            up, down = halves(module.weight, 10)
            replacements[name] = LowRankFactors(down, up)
    replace_modules(model, replacements)
    return model


WINDOWS = sequences(72, seed=1000)
SETTINGS = {"batch_size": 8, "validation_windows": 8, "epochs": 8, "learning_rate": 0.003, "evaluate_every": 8}


def parts_in(folder: Path) -> Parts:
    folder.mkdir(exist_ok=True)
    return Parts(folder)


def test_the_loss_of_each_block_falls_and_so_does_the_perplexity(tmp_path: Path) -> None:
    model, dense, held_out = compressed_model(), dense_model(), sequences(64, seed=2000)
    at_best, before = (float(loss_of(each, held_out).exp()) for each in (dense, model))
    assert before > 1.3 * at_best, "else there is nothing to win"
    blocks = distil_model(model, dense, WINDOWS, preset(**SETTINGS), 0, parts_in(tmp_path / "parts"))
    assert list(blocks) == [0, 2]
    for block in blocks.values():
        validation = dict(block.validation)
        assert validation[block.best] < 0.75 * validation[0]
        assert len(block.loss) == 64
    after = float(loss_of(model, held_out).exp())
    assert after - at_best < 0.6 * (before - at_best)


class Stopped(Exception):
    """The job is killed here."""


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_job_that_was_stopped_goes_on_after_the_last_block_and_gives_the_same(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = preset(**{**SETTINGS, "epochs": 1})
    whole = compressed_model()
    expected = distil_model(whole, dense_model(), WINDOWS, short, 0, parts_in(tmp_path / "whole"))

    trained: list[int] = []
    distil_block, allowed = distil.distil_block, finished

    def counted(model: PreTrainedModel, layer: int, *arguments: Any) -> Any:
        if len(trained) == allowed:
            raise Stopped
        trained.append(layer)
        return distil_block(model, layer, *arguments)

    monkeypatch.setattr(distil, "distil_block", counted)
    with pytest.raises(Stopped) if finished < 2 else nullcontext():
        distil_model(compressed_model(), dense_model(), WINDOWS, short, 0, parts_in(tmp_path / "parts"))
    assert trained == [0, 2][:finished]
    again, allowed = compressed_model(), 2
    found = distil_model(again, dense_model(), WINDOWS, short, 0, Parts(tmp_path / "parts"))
    assert trained == [0, 2], "each once"
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
    assert list(found) == list(expected)
    for layer, block in expected.items():
        assert (found[layer].loss, found[layer].validation) == (block.loss, block.validation)
        assert found[layer].best == block.best


def test_a_model_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="this checkpoint has no low-rank pair, so there is nothing to distil"):
        distil_model(dense_model(), dense_model(), WINDOWS, preset(), 0, parts_in(tmp_path / "parts"))


def test_inputs_decide_which_stream_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block reads the same in both; the third reads what the trained first one has changed."""
    seen: dict[tuple[str, ...], list[torch.Tensor]] = {}
    distil_block = distil.distil_block

    def watched(model: PreTrainedModel, layer: int, features: Any, tuning: Any, seed: int) -> Any:
        if layer == 2:
            seen[tuple(tuning.inputs)] = list(features.entering)
        return distil_block(model, layer, features, tuning, seed)

    monkeypatch.setattr(distil, "distil_block", watched)
    for inputs in (("dense",), ("compressed",), ("dense", "compressed")):
        model = compressed_model()
        short = preset(**{**SETTINGS, "epochs": 1, "inputs": list(inputs)})
        distil_model(model, dense_model(), WINDOWS, short, 0, parts_in(tmp_path / "-".join(inputs)))
        for name, read in zip(inputs, seen[inputs], strict=True):
            whole = dense_model() if name == "dense" else model
            with torch.no_grad():
                states = whole(WINDOWS, output_hidden_states=True).hidden_states[2]
            assert torch.allclose(read, states, atol=1e-5)
    assert len(seen) == 3


def test_both_models_over_two_devices_train_as_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dense = saved(tmp_path / "source", compressed_model()), saved(tmp_path / "dense", dense_model())
    short = preset(**{**SETTINGS, "epochs": 1})
    one, other = compressed_model().double(), dense_model().double()
    expected = distil_model(one, other, WINDOWS, short, 0, parts_in(tmp_path / "one"))
    with pretended.Pretended() as here:
        monkeypatch.setattr(distil, "pick_devices", lambda: pretended.devices(2))
        opened, model = distil._opened(dense, source, torch.float64)
        assert {device_of(block) for block in model.model.layers} == set(pretended.devices(2))
        assert [device_of(block) for block in opened.model.layers] == [device_of(block) for block in model.model.layers]
        found = distil_model(model, opened, WINDOWS, short, 0, parts_in(tmp_path / "two"))
    assert set(here.used) == {"lazy:0", "lazy:1"}
    for layer, block in expected.items():
        assert found[layer].best == block.best
        assert found[layer].loss == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in block.loss]
        for name, weight in block.weights.items():
            assert torch.allclose(found[layer].weights[name], weight, rtol=0, atol=1e-6)


def saved(folder: Path, model: PreTrainedModel) -> Path:
    (folder / "no_tokenizer").mkdir(parents=True)
    save_checkpoint(model, folder / "no_tokenizer", folder / "checkpoint")
    return folder / "checkpoint"


def test_the_whole_stage_writes_a_checkpoint_that_loads_and_its_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, dense = saved(tmp_path / "source", compressed_model()), saved(tmp_path / "dense", dense_model())
    a_tokenizer(source)
    write_manifest(tmp_path / "manifest.json")
    (tmp_path / "dense.json").write_text("{}")
    save_tensors(tmp_path / "tokens.safetensors", {"tokens": WINDOWS.int()})
    short = preset(**{**SETTINGS, "epochs": 1})
    settings = {
        "tuning": short.plain(), "subject": SUBJECT, "dtype": "float32", "code": "abc", "state": str(tmp_path / "state")
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        distil_checkpoint(
            source, tmp_path / "manifest.json", dense, tmp_path / "dense.json", tmp_path / "tokens.safetensors",
            tmp_path / "tuned", tmp_path / "tuned.json", settings,
        )  # fmt: skip
    expected = compressed_model()
    blocks = distil_model(expected, dense_model(), WINDOWS, short, 0, parts_in(tmp_path / "parts"))
    loaded = load_checkpoint(tmp_path / "tuned", torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert loaded.config.recipe == load_checkpoint(source, torch.float32).config.recipe, "the ranks stay"

    manifest = read_json(tmp_path / "tuned.json")
    assert (manifest["subject"], manifest["tuning"], manifest["ranks"]) == (SUBJECT, short.plain(), {"x": 6})
    assert manifest["files"]["model.safetensors"] == sha256_file(tmp_path / "tuned/model.safetensors")
    training = manifest["training"]
    assert training["steps"] == 16
    # two blocks of rank 10: q, k, v, o 32 x 32; gate, up and down 64 x 32
    assert training["trainable"] == 2 * 10 * (4 * (32 + 32) + 3 * (64 + 32))
    assert training["trainable_share"] == training["trainable"] / sum(p.numel() for p in loaded.parameters())
    assert list(training["blocks"]) == ["0", "2"]
    for layer, block in blocks.items():
        told = training["blocks"][str(layer)]
        assert told["best_step"] == block.best
        assert told["loss"] == [list(point) for point in block.loss]
        assert told["validation"] == [list(point) for point in block.validation]
    assert "16 steps, block by block" in (tmp_path / "tuned/README.md").read_text()
    told_of = [text.split(":")[0] for text in caplog.messages if "loss of held-out windows" in text]
    assert told_of == ["block 1 of 3", "block 3 of 3"]
    assert not list((tmp_path / "state").iterdir())
