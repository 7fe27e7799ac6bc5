"""Log-likelihoods of answers for lm-eval, in batches by tokens, each context read once.

lm-eval's own model class makes batches of so many texts, each a context with one answer, and takes logits and their
softmax at every position of the longest one. Here all answers to a context stand behind it in one row, each at the
positions that it has alone and masked from the others; a batch is of so many tokens, its rows are of about the same
length where it is not small, and the head reads the positions of answers only. Rows are padded on the right, where
causal attention never looks and positions do not move. So an answer's value depends on its row and its batch by
rounding alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lowrank.errors import RankwiseError
from lowrank.jobs.share import ALONE, Share
from lowrank.model.losses import CHUNK_TOKENS, head_of, last_hidden

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's: context and answer as text, and as token ids."""


LONGEST_ROW = 2048
"""Tokens of a row with several endings: its mask has their square."""
SMALL_BATCH = 1024
"""Tokens from which on padding costs more than one batch more."""


@dataclass(frozen=True)
class Ending:
    """What follows a context, and all answers whose likelihoods that gives.

    Attributes:
        tokens: an answer but for its last token.
        answers: (number of the request, its token ids); one token each, or the same text cut at another place.
    """

    tokens: tuple[int, ...]
    answers: list[tuple[int, list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """A row: a context, and its endings one after the other, none of which sees another.

    Attributes:
        context: its tokens, at least one.
        endings: at least one.
    """

    context: tuple[int, ...]
    endings: list[Ending]

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending.tokens) for ending in self.endings)


class AnswerScorer(HFLM):  # type: ignore[misc]
    """lm-eval's HFLM with the batches of this module.

    Of several processes each makes the same batches, runs the model on every so-many-th of them and takes the answers
    in the others from its peers: the same numbers as of one process, bit by bit. (The harness has a way of its own,
    which needs its own launcher, and makes other batches.)

    Attributes:
        batch_tokens: padding included; a context with one ending that is longer is a batch of its own.
        longest_row: tokens of a row with several endings, at most.
        share: this process among those of the job.
    """

    batch_tokens: int = 1
    longest_row: int = LONGEST_ROW
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
        shared = min(self.batch_tokens, self.longest_row, _reach(self.model))
        rows = make_readings(requests, self.max_length, shared)
        if not self.share.rank:
            alone = sum(len(row.context) + len(ending.tokens) for row in rows for ending in row.endings)
            told = "%d answers: %d tokens to read, %d with a context for each"
            log.info(told, len(requests), sum(map(len, rows)), alone)
        # Longer rows have one ending each, and batches of their own: a mask knows nothing of sliding windows.
        parts = ([row for row in rows if len(row) > shared], [row for row in rows if len(row) <= shared])
        for number, batch in enumerate(chain.from_iterable(batches(part, self.batch_tokens) for part in parts)):
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
            halves = _halves(batch)
            if halves is None:
                raise
        endings = sum(len(row.endings) for row in batch)
        log.info("%d texts at once do not fit the GPU's memory: in halves", endings)
        torch.cuda.empty_cache()
        first, second = halves
        return self._answers(first) + self._answers(second)


def _halves(batch: Sequence[Reading]) -> tuple[Sequence[Reading], Sequence[Reading]] | None:
    """Rows, or the endings of a single one; None, where nothing is left to divide."""
    if len(batch) > 1:
        return batch[: len(batch) // 2], batch[len(batch) // 2 :]
    (row,) = batch
    half = len(row.endings) // 2
    return ([replace(row, endings=row.endings[:half])], [replace(row, endings=row.endings[half:])]) if half else None


def _reach(model: Any) -> float:
    """Tokens that a model has positions for and that each of its blocks looks back on."""
    known = [getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((tokens for tokens in known if tokens is not None), default=math.inf)


def make_readings(requests: Sequence[Request], longest: int, shared: float) -> list[Reading]:
    """What has to be read for some requests: the longest rows first, equal texts once.

    Args:
        requests: of all answers to score.
        longest: tokens that the model reads; of longer texts the beginning is left out.
        shared: tokens of a row of several endings, at most.

    Raises:
        RankwiseError: an answer is longer than the model reads, or it or what stands before it has no tokens.
    """
    known: dict[tuple[int, ...], Ending] = {}
    last: dict[tuple[int, ...], Reading] = {}  # of each context the row that takes more
    rows: list[Reading] = []
    cut = 0
    for number, (text_of, before, answer) in enumerate(requests):
        if not before or not answer:
            raise RankwiseError(
                f"the answer {text_of[1]!r} behind {text_of[0]!r}: one of them has no tokens; if it is what the answer "
                "stands behind, set `add_bos: true`"
            )
        if len(answer) > longest:
            raise RankwiseError(
                f"an answer of {len(answer)} tokens does not fit a context of {longest}; raise the suite's `max_length`"
            )
        text = before + answer
        cut += len(text) > longest + 1
        tokens = tuple(text[-(longest + 1) : -1])
        if tokens not in known:
            split = len(tokens) - len(answer) + 1
            context, known[tokens] = tokens[:split], Ending(tokens[split:])
            row = last.get(context)
            if row is None or len(row) + len(answer) - 1 > shared:
                rows.append(row := Reading(context, []))
                last[context] = row
            row.endings.append(known[tokens])
        known[tokens].answers.append((number, answer))
    if cut:
        log.warning(
            "%d of %d texts are longer than %d tokens: read without their beginning", cut, len(requests), longest
        )
    return sorted(rows, key=lambda row: (-len(row), row.context, row.endings[0].tokens))


def batches(readings: Sequence[Reading], tokens: int) -> Iterator[Sequence[Reading]]:
    """Neighbours that together have at most so many tokens, each counted as long as the first of them.

    A batch that is not small takes no row that would be padding by more than an eighth.
    """
    start = 0
    while start < len(readings):
        longest, end = len(readings[start]), start + 1
        for row in readings[start + 1 : start + tokens // longest]:
            if (end - start) * longest >= SMALL_BATCH and 8 * len(row) < 7 * longest:
                break
            end += 1
        yield readings[start:end]
        start = end


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch stand.

    Attributes:
        ids: rows x longest; padded with zeros.
        positions: of each token in its own text, rows x longest.
        parts: 0 for tokens of contexts, 1, 2, ... for those of a row's endings, rows x longest.
        places: of all answers' tokens, one after the other: where the hidden state stands that predicts it, as an
            index into rows x longest.
        asked: of each answer the number of its request, and its token ids.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    parts: torch.Tensor
    places: torch.Tensor
    asked: list[tuple[int, list[int]]]

    @classmethod
    def of(cls, batch: Sequence[Reading]) -> Layout:
        """Of a batch."""
        longest = max(len(row) for row in batch)
        ids, positions, parts = torch.zeros(3, len(batch), longest, dtype=torch.long)
        places: list[int] = []
        asked: list[tuple[int, list[int]]] = []
        for number, row in enumerate(batch):
            start = len(row.context)
            ids[number, :start] = torch.tensor(row.context)
            positions[number, :start] = torch.arange(start)
            for part, ending in enumerate(row.endings, 1):
                end = start + len(ending.tokens)
                ids[number, start:end] = torch.tensor(ending.tokens, dtype=torch.long)
                positions[number, start:end] = torch.arange(len(row.context), len(row.context) + end - start)
                parts[number, start:end] = part
                text = [*range(len(row.context)), *range(start, end)]
                for request, answer in ending.answers:
                    places += [number * longest + at for at in text[-len(answer) :]]
                    asked.append((request, answer))
                start = end
        return cls(ids, positions, parts, torch.tensor(places), asked)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to attention's scores, rows x 1 x longest x longest: of other endings nothing is seen."""
        seen = (self.parts[:, None, :] == 0) | (self.parts[:, None, :] == self.parts[:, :, None])
        seen &= torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@torch.inference_mode()
def score(model: Any, batch: Sequence[Reading], device: torch.device) -> list[tuple[int, float, bool]]:
    """One forward pass: for each answer the number of its request, its log-likelihood, and whether it is the first
    choice at each of its tokens."""
    layout = Layout.of(batch)
    given = {}
    if any(len(row.endings) > 1 for row in batch):  # else causal attention does it
        given = {"position_ids": layout.positions.to(device), "attention_mask": layout.mask(model.dtype).to(device)}
    hidden = last_hidden(model, layout.ids.to(device), **given).flatten(0, 1)[layout.places.to(device)]
    targets = torch.tensor([token for _, answer in layout.asked for token in answer], device=device)
    values, firsts = [], []
    for part in range(0, len(targets), CHUNK_TOKENS):
        wanted = targets[part : part + CHUNK_TOKENS, None]
        logits = head_of(model)(hidden[part : part + CHUNK_TOKENS]).float()
        values.append(logits.log_softmax(dim=-1).gather(1, wanted).squeeze(1))
        firsts.append(logits.argmax(dim=-1) == wanted.squeeze(1))
    owners = torch.tensor([at for at, (_, answer) in enumerate(layout.asked) for _ in answer])
    none = torch.zeros(len(layout.asked), dtype=torch.float64)
    sums = none.index_add(0, owners, torch.cat(values).double().cpu()).tolist()
    missed = none.index_add(0, owners, (~torch.cat(firsts)).double().cpu()).tolist()
    return [(number, sums[at], not missed[at]) for at, (number, _) in enumerate(layout.asked)]
