"""Log-likelihoods of answers for lm-eval, in batches by tokens.

lm-eval's own model class makes batches of so many texts and takes logits and their softmax at every position of the
longest one. Here a batch is of so many tokens, its texts are of about the same length, and the head reads the
positions of answers only. Texts are padded on the right, where causal attention never looks and positions do not
move, so that an answer's value depends on its batch by rounding alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lowrank.errors import RankwiseError
from lowrank.jobs.share import ALONE, Share
from lowrank.model.losses import CHUNK_TOKENS, head_of, last_hidden

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: context and answer as text, and as token ids."""


@dataclass(frozen=True)
class Reading:
    """Tokens that are read once, and all answers whose likelihoods that gives.

    Attributes:
        tokens: all but the last token of a context with its answer.
        answers: (number of the request, its token ids); one token each, or the same tokens cut at another place.
    """

    tokens: tuple[int, ...]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)


class AnswerScorer(HFLM):  # type: ignore[misc]
    """lm-eval's HFLM with the batches of this module.

    Of several processes each makes the same batches, runs the model on every so-many-th of them and takes the answers
    in the others from its peers: the same numbers as of one process, bit by bit. (The harness has a way of its own,
    which needs its own launcher, and makes other batches.)

    Attributes:
        batch_tokens: padding included; a text that is longer is a batch of its own.
        share: this process among those of the job.
    """

    batch_tokens: int = 1
    share: Share = ALONE

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Without a progress bar for the tokenizer, which takes a moment: each task has a line in the log."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Request], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer, and whether it is the model's first choice at each of its tokens.

        Raises:
            RankwiseError: a log-likelihood is not finite.
        """
        found = torch.zeros(len(requests), 3, dtype=torch.float64)  # value, first choice, whether it is known
        readings = make_readings(requests, self.max_length)
        for number, batch in enumerate(batches(readings, self.batch_tokens)):
            if number % self.share.world == self.share.rank:
                for request, value, first in self._answers(batch):
                    if math.isfinite(value):
                        found[request] = torch.tensor([value, first, 1])
        answers = self.share.sum(found).tolist()
        if not all(known for *_, known in answers):
            raise RankwiseError(
                "the model's log-likelihoods are not finite. Set `dtype: float32` for this model in the config, or "
                "look at the checkpoint: its weights may be damaged."
            )
        return [(value, bool(first)) for value, first, _ in answers]

    def _answers(self, batch: Sequence[Reading]) -> list[tuple[int, float, bool]]:
        """Of a batch; in halves, if the GPU's memory does not hold it."""
        try:
            return score(self.model, batch, self.device)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        log.info("%d texts at once do not fit the GPU's memory: in halves", len(batch))
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._answers(batch[:half]) + self._answers(batch[half:])


def make_readings(requests: Sequence[Request], longest: int) -> list[Reading]:
    """What has to be read for some requests: the longest first, equal ones once.

    Args:
        requests: of all answers to score.
        longest: tokens that the model reads; of longer texts the beginning is left out.

    Raises:
        RankwiseError: an answer is longer than that.
    """
    readings: dict[tuple[int, ...], Reading] = {}
    cut = 0
    for number, (_, context, answer) in enumerate(requests):
        if len(answer) > longest:
            raise RankwiseError(
                f"an answer of {len(answer)} tokens does not fit a context of {longest}; raise the suite's `max_length`"
            )
        text = context + answer
        cut += len(text) > longest + 1
        tokens = tuple(text[-(longest + 1) : -1])
        readings.setdefault(tokens, Reading(tokens)).answers.append((number, answer))
    if cut:
        log.warning(
            "%d of %d texts are longer than %d tokens: read without their beginning", cut, len(requests), longest
        )
    return sorted(readings.values(), key=lambda reading: (-len(reading.tokens), reading.tokens))


def batches(readings: Sequence[Reading], tokens: int) -> Iterator[Sequence[Reading]]:
    """Neighbours that together have at most so many tokens, each counted as long as the first of them."""
    start = 0
    while start < len(readings):
        size = max(1, tokens // len(readings[start].tokens))
        yield readings[start : start + size]
        start += size


@torch.inference_mode()
def score(model: Any, batch: Sequence[Reading], device: torch.device) -> list[tuple[int, float, bool]]:
    """One forward pass: for each answer the number of its request, its log-likelihood, and whether it is the first
    choice at each of its tokens."""
    longest = max(len(reading.tokens) for reading in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, reading in zip(ids, batch, strict=True):
        row[: len(reading.tokens)] = torch.tensor(reading.tokens)
    asked = [
        (row, len(reading.tokens), number, answer)
        for row, reading in enumerate(batch)
        for number, answer in reading.answers
    ]
    places = [row * longest + end - len(answer) + at for row, end, _, answer in asked for at in range(len(answer))]
    hidden = last_hidden(model, ids.to(device)).flatten(0, 1)[torch.tensor(places, device=device)]
    targets = torch.tensor([token for *_, answer in asked for token in answer], device=device)
    values, firsts = [], []
    for part in range(0, len(targets), CHUNK_TOKENS):
        wanted = targets[part : part + CHUNK_TOKENS, None]
        logits = head_of(model)(hidden[part : part + CHUNK_TOKENS]).float()
        values.append(logits.log_softmax(dim=-1).gather(1, wanted).squeeze(1))
        firsts.append(logits.argmax(dim=-1) == wanted.squeeze(1))
    owners = torch.tensor([at for at, (*_, answer) in enumerate(asked) for _ in answer])
    none = torch.zeros(len(asked), dtype=torch.float64)
    sums = none.index_add(0, owners, torch.cat(values).double().cpu()).tolist()
    missed = none.index_add(0, owners, (~torch.cat(firsts)).double().cpu()).tolist()
    return [(number, sums[at], not missed[at]) for at, (_, _, number, _) in enumerate(asked)]
