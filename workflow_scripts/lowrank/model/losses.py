"""Next-token losses in chunks of tokens, so that logits over the whole vocabulary exist for one chunk at a time.

Logits are taken in the head's own dtype, as the model itself gives them; the softmax is in float32. A model whose
head has no bias and no scaling is assumed, which holds for all of `FAMILIES`; it may bound its logits (Gemma).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of

Direction = Literal["reverse", "forward"]
"""reverse: KL(model || reference); forward: KL(reference || model)."""

CHUNK_TOKENS = 256
"""Tokens whose logits are held at once: 50 MB in float32 for a vocabulary of 49k, 156 MB for 152k."""


class SoftCappedHead(nn.Module):
    """A linear head of which no logit exceeds a bound: c tanh(head(h) / c).

    Attributes:
        head: d -> vocabulary.
        cap: c.
    """

    def __init__(self, head: nn.Linear, cap: float) -> None:
        super().__init__()
        self.head = head
        self.cap = cap

    @property
    def weight(self) -> torch.Tensor:
        """Of the linear layer, vocabulary x d."""
        return self.head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., d) to (..., vocabulary)."""
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


Head = nn.Linear | SoftCappedHead


def head_of(model: PreTrainedModel) -> Head:
    """What leads from final hidden states to logits: a linear layer, and a bound if the model's configuration has one.

    Raises:
        RankwiseError: the model has no linear head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RankwiseError(
            f"{type(model).__name__}: a linear language-model head is needed, not {type(head).__name__}"
        )
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return head if cap is None else SoftCappedHead(head, cap)


def last_hidden(model: PreTrainedModel, input_ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm: what the head reads.

    Args:
        model: a dense or compressed causal language model of a known family.
        input_ids: token ids, batch x length, without padding (or padded on the right: attention is causal).
        given: the decoder's `position_ids`, batch x length, and `attention_mask`, batch x 1 x length x length, which is
            added to the scores of all blocks; without them, tokens see all that stand before them.

    Returns:
        batch x length x d, in the model's dtype.

    Raises:
        RankwiseError: an unknown family, an OPT whose embeddings are narrower than its hidden states, or more tokens
            than the model was made for.
    """
    decoder = model.get_submodule(family_of(model).decoder)
    if getattr(decoder, "project_out", None) is not None:
        raise RankwiseError("OPT models with a projection after the last block (opt-350m) are not supported")
    length, longest = input_ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:  # rotary positions go on without a complaint
        raise RankwiseError(f"windows of {length} tokens, but the model reads at most {longest}; lower `length`")
    hidden: torch.Tensor = decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state
    return hidden


def token_nll(hidden: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int = CHUNK_TOKENS) -> torch.Tensor:
    """Negative log-likelihood of each target, `-log softmax(head(h_t))[y_t]`.

    Args:
        hidden: T x d, final hidden states.
        head: d -> vocabulary.
        targets: T token ids.
        chunk: tokens at a time; it does not change the result.

    Returns:
        T values in nats, float32.
    """
    losses = [
        functional.cross_entropy(head(hidden[part]).float(), targets[part].long(), reduction="none")
        for part in _parts(len(hidden), chunk)
    ]
    return _joined(losses, hidden)


@torch.no_grad()
def draw_tokens(hidden: torch.Tensor, head: Head, draw: torch.Generator) -> torch.Tensor:
    """One next token for each state, drawn from softmax(head(h_t)).

    The largest of logits with Gumbel noise has that distribution; minus the logarithm of an exponential is such noise.

    Args:
        hidden: T x d, final hidden states; logits of all are held at once.
        head: d -> vocabulary.
        draw: on the states' device.

    Returns:
        T token ids.
    """
    logits: torch.Tensor = head(hidden).float()
    noise = torch.empty_like(logits).exponential_(generator=draw)
    return (logits - noise.log_()).argmax(dim=-1)


def token_kl(
    hidden_p: torch.Tensor,
    head_p: Head,
    hidden_q: torch.Tensor,
    head_q: Head,
    chunk: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) of the next-token distributions of two models.

    Args:
        hidden_p, hidden_q: T x d_p and T x d_q, final hidden states of the two models on the same tokens.
        head_p, head_q: their heads, over the same vocabulary.
        chunk: tokens at a time; it does not change the result.

    Returns:
        T values in nats, float32, none below zero.
    """
    divergences = [
        _kl(_log_probabilities(hidden_p[part], head_p), _log_probabilities(hidden_q[part], head_q))
        for part in _parts(len(hidden_p), chunk)
    ]
    return _joined(divergences, hidden_p)


def token_nll_and_kl(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    chunk: int = CHUNK_TOKENS,
    direction: Direction = "reverse",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_nll` of a model and its divergence from a reference in one pass; both models share the head.

    Args:
        hidden: T x d, final hidden states of the model.
        reference_hidden: T x d, those of the reference.
        head: d -> vocabulary.
        targets: T token ids.
        chunk: tokens at a time; it does not change the result.
        direction: of the divergence.

    Returns:
        Two tensors of T values in nats, float32: the loss of each target, and the divergence.
    """
    losses, divergences = [], []
    for part in _parts(len(hidden), chunk):
        log_p = _log_probabilities(hidden[part], head)
        losses.append(-log_p.gather(1, targets[part, None].long()).squeeze(1))
        log_q = _log_probabilities(reference_hidden[part], head)
        divergences.append(_kl(log_p, log_q) if direction == "reverse" else _kl(log_q, log_p))
    return _joined(losses, hidden), _joined(divergences, hidden)


def _log_probabilities(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """T x vocabulary, float32."""
    return functional.log_softmax(head(hidden).float(), dim=-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) per row; rounding can leave a sum just below zero, which is set to zero."""
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).clamp_min(0.0)


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device=like.device)
