"""Token perplexity on windows of token ids, with its standard error.

Protocol. A window of L tokens is read on its own, and the model's loss on token t is given tokens 0 .. t-1 of that
window. With stride = L (no overlap) every token of a window but its first is scored. With stride < L the next window
starts `stride` tokens later: the first window is scored as before, each later one on its last `stride` tokens only,
so that no token counts twice and each has at least L - stride tokens of context.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.calibration.corpora import consecutive_windows, default_bos, load_documents, read_index, token_hash
from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.jobs.share import ALONE, Share
from lowrank.model.checkpoint import family_of, load_checkpoint
from lowrank.model.devices import pick_devices
from lowrank.model.losses import head_of, last_hidden, token_nll
from lowrank.model.runtime import parse_dtype
from lowrank.model.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""Tokens of one forward pass; at least one window. The result does not depend on it."""


@dataclass(frozen=True)
class WindowLosses:
    """Losses of the windows of a corpus.

    Attributes:
        nll: summed negative log-likelihood of each window's scored tokens, nats.
        tokens: how many tokens of each window were scored.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Token-weighted mean, m = sum_i nll_i / sum_i n_i, in nats a token."""
        return math.fsum(self.nll) / sum(self.tokens)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean, windows being the independent units; None for a single window.

        Delta method for the ratio of two sums over k windows:
        `se^2 = k / (k - 1) * sum_i (nll_i - m n_i)^2 / (sum_i n_i)^2`.
        """
        k, mean = len(self.nll), self.mean
        if k < 2:
            return None
        residuals = math.fsum((nll - mean * n) ** 2 for nll, n in zip(self.nll, self.tokens, strict=True))
        return math.sqrt(k / (k - 1) * residuals) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """`exp(mean)`.

        Raises:
            RankwiseError: it is too large for a number.
        """
        try:
            return math.exp(self.mean)
        except OverflowError as error:
            raise RankwiseError(
                f"a mean loss of {self.mean:.0f} nats a token has no finite perplexity: the model is broken. "
                "Remove fewer parameters, or choose another method."
            ) from error

    def summary(self) -> dict[str, Any]:
        """The corpus's entry in the evaluation JSON; the perplexity's error is `perplexity * stderr_nll`."""
        perplexity, stderr = self.perplexity, self.stderr
        return {
            "perplexity": perplexity,
            "stderr": None if stderr is None else perplexity * stderr,
            "mean_nll": self.mean,
            "stderr_nll": stderr,
            "tokens": sum(self.tokens),
            "windows": len(self.nll),
            "window_nll": [nll / n for nll, n in zip(self.nll, self.tokens, strict=True)],
            "window_tokens": list(self.tokens),
        }


def evaluate_share(arguments: dict[str, Any], share: Share) -> dict[str, Any]:
    """A process's share of an evaluation.

    Args:
        arguments: "checkpoint" (folder), "dtype", "suite" (as a plain dict), "corpora" (their index files).
        share: this process among those of the job.

    Returns:
        "corpora" and "protocol", see `evaluate_corpora`.
    """
    checkpoint = arguments["checkpoint"]
    model = load_checkpoint(checkpoint, parse_dtype(arguments["dtype"]), pick_devices())
    suite = PerplexitySuite.model_validate(arguments["suite"])
    tokenizer = load_tokenizer(checkpoint)
    corpora, protocol = evaluate_corpora(model, checkpoint, tokenizer, suite, arguments["corpora"], share)
    return {"corpora": corpora, "protocol": protocol}


def evaluate_corpora(
    model: PreTrainedModel,
    name: str,
    tokenizer: Any,
    suite: PerplexitySuite,
    indices: Sequence[str | Path],
    share: Share = ALONE,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Perplexity of a model on each corpus of a suite.

    Args:
        model: in evaluation mode, on the device that computes.
        name: what messages call it (its folder).
        tokenizer: the model's.
        suite: corpora, length, stride, number of windows, BOS.
        indices: the index files of the corpora, one for each name in `suite.corpora`, in any order.
        share: this process among those of the job.

    Returns:
        Corpus -> its entry (see `WindowLosses.summary`, with the hashes of its file and of the windows), and what
        else defines the numbers.

    Raises:
        RankwiseError: a text too short for the windows, a corpus of another tokenizer, a loss that is not finite.
    """
    stride = suite.stride or suite.length
    bos, bos_each = default_bos(tokenizer) if suite.add_bos else None, family_of(model).needs_bos
    files = {read_index(index)["corpus"]: index for index in indices}
    results: dict[str, dict[str, Any]] = {}
    for corpus in suite.corpora:
        try:
            windows = consecutive_windows(
                load_documents(files[corpus]), tokenizer, suite.length, stride, suite.windows, suite.add_bos, bos_each
            )
            losses = evaluate_perplexity(model, windows, stride, share=share)
            results[corpus] = losses.summary()
        except RankwiseError as error:
            raise RankwiseError(f"{name} on the corpus '{corpus}': {error}") from error
        results[corpus] |= {"sha256": read_index(files[corpus])["sha256"], "tokens_sha256": token_hash(windows)}
        entry = results[corpus]
        log.info("%s: perplexity %.3f on %d tokens", corpus, entry["perplexity"], entry["tokens"])
    protocol = {
        "stride": stride,
        "scored": "all tokens of a window but the first"
        if stride == suite.length
        else f"all tokens of the first window but its first, the last {stride} tokens of the others",
        "documents": "joined by an empty line, tokenised together; windows of a `tokens:` corpus as they are",
        "bos_token": bos,
        "bos": "nowhere"
        if bos is None
        else "before each window of a text, as this family needs it; not scored"
        if bos_each
        else "once, before the first document",
        "softmax": "float32",
        "stderr": "delta method for the ratio of summed losses to tokens, windows as units",
    }
    return results, protocol


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    share: Share = ALONE,
) -> WindowLosses:
    """Losses of a model on windows of one length.

    Args:
        model: in evaluation mode, on the device that computes.
        windows: n x length token ids; with a stride below the length, consecutive windows overlap (see above).
        stride: tokens between the starts of two windows; None: the length.
        batch_tokens: tokens of one forward pass, roughly.
        share: this process among those of the job; each runs some of the batches, and all return all losses.

    Raises:
        RankwiseError: no scored token, an id outside the vocabulary, or a loss that is not finite.
    """
    count, length = windows.shape
    stride = stride or length
    _check(windows, model)
    batch = max(1, batch_tokens // length)
    nll = torch.zeros(count, dtype=torch.float64)
    mine = share.of(-(-count // batch))
    first, last = mine.start * batch, min(mine.stop * batch, count)
    started, next_report = time.monotonic(), 0.1
    for start in range(first, last, batch):
        losses = _losses(model, windows[start : start + batch].to(model.device))
        for index, row in enumerate(losses, start=start):
            nll[index] = row[-_scored(index, stride, length) :].double().sum()
            if not bool(nll[index].isfinite()):
                raise RankwiseError(
                    f"the loss on window {index} (of 0 to {count - 1}) is not finite. Set `dtype: float32` for this "
                    "model in the config, or look at the checkpoint: its weights may be damaged."
                )
        read = start + len(losses) - first
        done = read / (last - first)
        if done >= next_report or done == 1:
            rate = share.world * read * length / (time.monotonic() - started)
            log.info("%.0f %% of %d windows, %.0f tokens/s", 100 * done, count, rate)
            next_report = done + 0.1
    tokens = tuple(_scored(index, stride, length) for index in range(count))
    return WindowLosses(tuple(share.sum(nll).tolist()), tokens)


def _scored(window: int, stride: int, length: int) -> int:
    """How many tokens of a window are scored: its last ones."""
    return length - 1 if window == 0 or stride == length else stride


def _check(windows: torch.Tensor, model: PreTrainedModel) -> None:
    count, length = windows.shape
    if not count or length < 2:
        raise RankwiseError(f"{count} windows of {length} tokens hold nothing to score; use longer texts")
    vocabulary = model.config.vocab_size
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise RankwiseError(
            f"token ids reach from {int(windows.min())} to {int(windows.max())}, but the model knows "
            f"0 to {vocabulary - 1}. The windows were made with another tokenizer."
        )


@torch.inference_mode()
def _losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Loss of each token but the first: batch x (length - 1), nats, float32, on the CPU."""
    windows = windows.long()
    hidden = last_hidden(model, windows)[:, :-1]
    nll = token_nll(hidden.flatten(0, 1), head_of(model), windows[:, 1:].flatten())
    return nll.view(len(windows), -1).cpu()
