"""Families whose projections are stored fused (Phi-3): layers of their own in memory, whole in dense checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from lowrank.model.checkpoint import load_checkpoint, save_checkpoint
from lowrank.model.families import FAMILIES
from lowrank.model.modeling_rankwise import separate_projections
from lowrank.model.parameters import dense_total
from tests import tiny

IDS = torch.randint(2, 400, (2, 24), generator=torch.Generator().manual_seed(3))  # longer than the sliding window


@pytest.fixture
def stock() -> PreTrainedModel:
    """As transformers makes it."""
    config = Phi3Config(
        **{"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 24},
        **{"num_key_value_heads": 2, "intermediate_size": 160, "sliding_window": 9, "partial_rotary_factor": 0.5},
        **{"initializer_range": 0.1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1},
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model


def test_separated_projections_compute_the_same(stock: PreTrainedModel) -> None:
    expected, parameters = stock(IDS).logits, stock.num_parameters()
    separate_projections(stock)
    names = {name.rpartition(".")[2] for name, module in stock.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {linear.path.rpartition(".")[2] for linear in FAMILIES["phi3"].types} | {"lm_head"}
    torch.testing.assert_close(stock(IDS).logits, expected, rtol=0, atol=1e-5)
    assert stock.num_parameters() == dense_total(stock) == parameters
    separate_projections(stock)  # there is nothing left to separate
    torch.testing.assert_close(stock(IDS).logits, expected, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    plain = stock.generate(IDS[:, :6], use_cache=False, **options)  # past the window
    assert torch.equal(stock.generate(IDS[:, :6], use_cache=True, **options), plain)


def test_a_dense_checkpoint_is_written_as_transformers_writes_it(stock: PreTrainedModel, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    expected = stock(IDS).logits
    stock.save_pretrained(tmp_path / "stock")
    save_checkpoint(load_checkpoint(tmp_path / "stock", torch.float32), tmp_path / "tokenizer", tmp_path / "written")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "written"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert torch.equal(again(IDS).logits, expected)
