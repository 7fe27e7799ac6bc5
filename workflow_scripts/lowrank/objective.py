"""What the search minimises: perplexity plus a weighted KL divergence to the dense model (paper, Equation 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowrank.errors import RankwiseError
from lowrank.losses import head_of, last_hidden, token_nll, token_nll_and_kl
from lowrank.sliced import SlicedModel

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Score:
    """One evaluation of an allocation.

    Attributes:
        perplexity: over all validation windows.
        kl: mean of KL(compressed || dense) per token, in nats.
        objective: perplexity + weight x kl.
    """

    perplexity: float
    kl: float
    objective: float


class Objective:
    """Perplexity and KL divergence of a sliced model on fixed windows.

    Only the dense model's last hidden states are kept (windows x length x d); its logits are recomputed with those
    of the compressed model, a few hundred tokens at a time, so memory does not grow with the vocabulary.
    """

    def __init__(self, sliced: SlicedModel, windows: torch.Tensor, kl_weight: float, device: torch.device) -> None:
        """Run the dense model once.

        Args:
            sliced: the model.
            windows: n x length token ids.
            kl_weight: weight of the mean KL divergence per token.
            device: where the model is.
        """
        self.sliced, self.kl_weight, self.device = sliced, kl_weight, device
        self.batches = list(torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])))
        sliced.set_ranks({})
        with torch.inference_mode():
            self.reference = [last_hidden(sliced.model, ids.to(device)).cpu() for ids in self.batches]

    def evaluate(self, ranks: Mapping[str, int | None]) -> Score:
        """Score an allocation.

        Raises:
            RankwiseError: the model's loss is not finite.
        """
        self.sliced.set_ranks(ranks)
        head = head_of(self.sliced.model)
        loss, divergence, count = 0.0, 0.0, 0
        with torch.inference_mode():
            for ids, reference in zip(self.batches, self.reference, strict=True):
                hidden = last_hidden(self.sliced.model, ids.to(self.device))
                nll, kl = token_nll_and_kl(
                    hidden[:, :-1].flatten(0, 1),
                    reference[:, :-1].flatten(0, 1).to(self.device),
                    head,
                    ids[:, 1:].flatten().to(self.device),
                )
                loss += float(nll.double().sum())
                divergence += float(kl.double().sum())
                count += nll.numel()
        perplexity = float(torch.tensor(loss / count, dtype=torch.float64).exp())
        score = Score(perplexity, divergence / count, perplexity + self.kl_weight * divergence / count)
        if not torch.tensor([score.objective]).isfinite().all():
            raise RankwiseError(
                f"the loss of an allocation is not finite (mean NLL {loss / count}); ranks: {dict(ranks)}"
            )
        return score


def window_losses(sliced: SlicedModel, windows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Mean negative log-likelihood per token of each window, n, in float64, at the ranks that are set."""
    head = head_of(sliced.model)
    losses = []
    with torch.inference_mode():
        for ids in torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])):
            hidden = last_hidden(sliced.model, ids.to(device))
            nll = token_nll(hidden[:, :-1].flatten(0, 1), head, ids[:, 1:].flatten().to(device))
            losses.append(nll.double().view(len(ids), -1).mean(dim=1).cpu())
    return torch.cat(losses)
