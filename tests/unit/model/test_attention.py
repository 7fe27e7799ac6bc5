"""Attention of grouped queries on GPUs: who asks torch to share keys, and who has them repeated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.integrations import sdpa_attention

from lowrank.model import checkpoint
from lowrank.sources.checks import skeleton_of
from tests import tiny


def key(dtype: torch.dtype, is_cuda: bool = True, width: int = 64) -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, device=torch.device("cuda"), shape=(1, 2, 16, width))


@pytest.mark.parametrize(
    ("dtype", "capability", "shares"),
    [
        (torch.bfloat16, 9, True),
        (torch.float16, 8, True),
        (torch.float16, 7, False),  # a T4 or V100: no flash attention
        (torch.float32, 9, False),
        (torch.float64, 9, False),
    ],
)
def test_keys_are_shared_where_flash_attention_can(
    dtype: torch.dtype, capability: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    asked = sdpa_attention.use_gqa_in_sdpa
    assert asked.__module__ == "lowrank.model.attention"
    assert asked(None, key(dtype), key(dtype)) is shares
    assert not asked(torch.zeros(1), key(dtype), key(dtype))  # as transformers says itself
    assert not asked(None, key(dtype, width=512), key(dtype, width=512))
    assert asked(None, key(dtype, is_cuda=False), key(dtype, is_cuda=False))


def test_repeated_keys_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama-gqa").to(torch.float64)
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    shared = model(ids).logits
    asked: list[bool] = []
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *given: bool(asked.append(True)))
    assert torch.allclose(model(ids).logits, shared, atol=1e-12)
    assert asked


@pytest.mark.parametrize("own", ["eager", "flash_attention_2"])
def test_a_models_own_choice_of_attention_is_not_taken(own: str, tmp_path: Any) -> None:
    """Its kernel may not be there, or not know a mask of ours."""
    model = tiny.model("llama")
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", f'{{"attn_implementation": "{own}",', 1))
    opened = checkpoint.load_checkpoint(tmp_path, torch.float32)
    assert opened.config._attn_implementation == "sdpa"
    assert skeleton_of(AutoConfig.from_pretrained(tmp_path)).config._attn_implementation == "sdpa"
