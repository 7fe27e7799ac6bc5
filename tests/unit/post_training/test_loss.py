"""Loss against full logits; learning rates, rows of a step, and the engine's configuration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lowrank.config.tuning import Tuning
from lowrank.errors import RankwiseError
from lowrank.post_training import loss as loss_module
from lowrank.post_training.instructions import IGNORED
from lowrank.post_training.loss import InstructionLoss
from lowrank.post_training.schedule import (
    accumulation_steps,
    engine_config,
    learning_rate,
    rows_of_step,
    total_steps,
)

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def a_model(family: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    if family == "gemma3_text":
        config = Gemma3TextConfig(**SHAPE, intermediate_size=24, num_key_value_heads=1, final_logit_softcapping=0.5)
        return Gemma3ForCausalLM(config).double().eval(), "model"
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=24)).double().eval(), "model"
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16)).double().eval(), "model.decoder"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_value_and_gradient_equal_those_of_full_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 3)
    model, decoder = a_model(family)
    model.requires_grad_(False)
    watched = next(p for n, p in model.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
    watched.requires_grad_(True)
    tokens = torch.randint(3, 50, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = labels[1, 6:] = IGNORED

    ours = InstructionLoss(model, decoder)(tokens, labels)
    (2.5 * ours).backward()
    gradient = watched.grad.clone()
    watched.grad = None
    logits = model(input_ids=tokens).logits[:, :-1]
    reference = nn.functional.cross_entropy(logits.reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="sum")
    (2.5 * reference).backward()
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, watched.grad, rtol=1e-10, atol=1e-12)


def test_what_lies_behind_the_padding_does_not_matter() -> None:
    model, decoder = a_model("llama")
    tokens = torch.randint(3, 50, (1, 9))
    labels = tokens.clone()
    labels[0, 6:] = IGNORED
    other = tokens.clone()
    other[0, 6:] = 0
    with torch.no_grad():
        first, second = (InstructionLoss(model, decoder)(row, labels) for row in (tokens, other))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_learning_rates_rise_then_fall_and_are_never_zero() -> None:
    rates = [learning_rate(step, steps=8, warmup=3, peak=1.0) for step in range(8)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert learning_rate(0, steps=5, warmup=0, peak=2.0) == 2.0


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), batch=st.integers(1, 25), seed=st.integers(0, 9))
def test_each_epoch_sees_every_row_once(rows: int, batch: int, seed: int) -> None:
    stream = [row for step in range(3 * rows) for row in rows_of_step(step, batch, rows, seed)]
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = (rows_of_step(step, 40, 40, seed=0) for step in (0, 1))
    assert first != second
    assert first != rows_of_step(0, 40, 40, seed=1)


def a_tuning(**changes: object) -> Tuning:
    values = {"instructions": "a", "batch_size": 8, "micro_batch_size": 2, "warmup_steps": 2} | changes
    return Tuning.model_validate(values)


def test_steps_follow_from_epochs_or_are_given() -> None:
    assert total_steps(a_tuning(epochs=1.5), rows=100) == 18  # 150 rows / 8
    assert total_steps(a_tuning(steps=5), rows=100) == 5
    assert total_steps(a_tuning(), rows=100) == 25  # two epochs
    with pytest.raises(RankwiseError, match=r"`warmup_steps: 20` leaves nothing of the 18 steps"):
        total_steps(a_tuning(epochs=1.5, warmup_steps=20), rows=100)


@pytest.mark.parametrize("keys", [{}, {"steps": 5}, {"steps": 5, "epochs": None}, {"epochs": 1.5}, {"steps": None}])
def test_a_preset_is_read_back_with_one_length(keys: dict[str, float | None]) -> None:
    tuning = a_tuning(**keys)
    assert (tuning.steps is None) != (tuning.epochs is None)
    assert Tuning.model_validate(tuning.plain()) == tuning


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    assert accumulation_steps(a_tuning(), processes=2) == 2
    with pytest.raises(RankwiseError, match=r"`batch_size: 8` is no multiple of `micro_batch_size: 2` x 3 processes"):
        accumulation_steps(a_tuning(), processes=3)


def test_a_deepspeed_file_may_not_repeat_the_tuning_preset() -> None:
    config = engine_config({"zero_optimization": {"stage": 2}}, a_tuning(), processes=1)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    with pytest.raises(RankwiseError, match=r"config/deepspeed/zero2.json: bf16, train_batch_size follows"):
        engine_config({"train_batch_size": 4, "bf16": {"enabled": True}}, a_tuning(), processes=1)
