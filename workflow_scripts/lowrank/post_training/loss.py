"""The language-model loss of post-training, with a gradient and without the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lowrank.model.losses import head_of
from lowrank.post_training.instructions import IGNORED

CHUNK_TOKENS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a frozen head, some tokens at a time.

    The gradient with respect to the hidden states is formed in the forward pass, chunk by chunk, so that
    logits of more than `CHUNK_TOKENS` tokens never exist and no head product is done twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(target) over tokens. hidden: N x d; targets: N, int64; the sum is float32 or float64."""
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for index in range(_rounds(len(hidden), hidden.device)):
            part = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
            chunk = hidden[part].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                logits = head(chunk).to(total.dtype)
                loss = nn.functional.cross_entropy(logits, targets[part], reduction="sum")
            if gradient is not None:
                gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """Scale the gradient that the forward pass formed."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def _rounds(tokens: int, device: torch.device) -> int:
    """How often the head is called: by all processes as often as by the one with most tokens, if need be with none.

    A head that is divided among them (ZeRO 3) is gathered by all of them or by none.
    """
    rounds = -(-tokens // CHUNK_TOKENS)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rounds
    most = torch.tensor(rounds, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


class InstructionLoss(nn.Module):
    """Summed negative log-likelihood of the scored tokens of a batch: the module that DeepSpeed runs."""

    def __init__(self, model: PreTrainedModel, decoder: str) -> None:
        """`decoder` is the path of the base model inside the causal language model (`Family.decoder`)."""
        super().__init__()
        self.model = model
        self.decoder = decoder

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens, labels: rows x length, labels `IGNORED` where nothing is scored. A scalar, not averaged."""
        hidden = self.model.get_submodule(self.decoder)(input_ids=tokens, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        scored = targets != IGNORED  # only these positions reach the head, the largest product of a small model
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden[:, :-1][scored], head_of(self.model), targets[scored])  # type: ignore[no-untyped-call]
        return loss
