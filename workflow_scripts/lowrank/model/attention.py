"""What keeps attention of grouped queries on GPUs in kernels that do not keep all scores."""

from __future__ import annotations

import torch
from transformers.integrations import sdpa_attention

FIRST_WITH_FLASH = 8
"""Compute capability from which on torch has flash attention."""


def repeat_keys_without_flash() -> None:
    """Have keys and values of grouped queries repeated where no kernel of torch shares them without keeping scores.

    transformers lets torch share them wherever there is no mask. On a GPU flash attention can, in 16 bits; what else
    there is of torch 2.13 then keeps length x length scores of each head and block for the way back. With repeated keys
    its memory-efficient attention does not.
    """
    asked = sdpa_attention.use_gqa_in_sdpa

    def use_gqa_in_sdpa(attention_mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
        return asked(attention_mask, key, value) and not (key.is_cuda and not _has_flash(key))

    sdpa_attention.use_gqa_in_sdpa = use_gqa_in_sdpa


def _has_flash(key: torch.Tensor) -> bool:
    return key.dtype.itemsize == 2 and torch.cuda.get_device_capability(key.device)[0] >= FIRST_WITH_FLASH
