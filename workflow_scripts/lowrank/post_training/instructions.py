"""Instruction data as token ids: prompt format, truncation, what is scored, and the split."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank.config.tuning import Tuning
from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, save_tensors

log = logging.getLogger(__name__)

# The split is the same for all seeds of a study, so that validation losses can be compared.
SPLIT_SEED = 42
IGNORED = -100

# The prompt format that the Alpaca data was published with; instruction-tuned models expect these very words.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, padded on the right.

    Attributes:
        tokens: int32, rows x longest.
        first: int64, rows; position of the first scored token of each row, at least 1.
        length: int64, rows; tokens of each row without padding.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> torch.Tensor:
        """How many tokens of each row count in the loss, int64."""
        return self.length - self.first

    def rows(self, indices: list[int] | torch.Tensor) -> Examples:
        """Some of the rows, in the given order."""
        return Examples(self.tokens[indices], self.first[indices], self.length[indices])

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Model input and labels, rows x longest of these rows (int64).

        Labels are the tokens themselves at scored positions and `IGNORED` elsewhere (prompt and padding).
        Padding is on the right, where causal attention keeps it from every real token, so no mask is needed.
        """
        width = int(self.length.max())
        tokens = self.tokens[:, :width].long()
        position = torch.arange(width)
        scored = (position >= self.first[:, None]) & (position < self.length[:, None])
        return tokens, tokens.masked_fill(~scored, IGNORED)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_tensors(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read what `save` wrote."""
        return cls(**load_tensors(path))


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Instruction rows of a jsonl file.

    Raises:
        RankwiseError: the file is missing, or a line is no object with `instruction` and `output`; it is named.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a text
    except (OSError, UnicodeDecodeError) as error:
        raise RankwiseError(f"{path}: cannot be read ({error}). Delete it and run the workflow again.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = (row["instruction"], row.get("input") or "", row["output"])
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise RankwiseError(
                f"{path}, line {number}: no instruction row ({error!r}); "
                "each line needs an object with `instruction`, `output` and perhaps `input`. Delete the file and run "
                "the workflow again."
            ) from error
        rows.append(dict(zip(("instruction", "input", "output"), map(str, texts), strict=True)))
    return rows


def prompt_of(row: Mapping[str, str]) -> str:
    """The text that comes before the response."""
    template = PROMPT_WITH_INPUT if row.get("input", "").strip() else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input", ""))


def tokenise_row(row: Mapping[str, str], tokenizer: Any, max_length: int, mask_prompt: bool) -> tuple[list[int], int]:
    """Token ids of prompt, response and end-of-sequence, cut at `max_length`, and the first scored position.

    Prompt and response are tokenised as one text; if a token spans the boundary, it belongs to the response.
    """
    prompt = prompt_of(row)
    ids: list[int] = tokenizer(prompt + row["output"])["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    pairs = zip(ids, tokenizer(prompt)["input_ids"], strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ids[:max_length], max(1, shared) if mask_prompt else 1


def tokenise(rows: Iterable[Mapping[str, str]], tokenizer: Any, max_length: int, mask_prompt: bool) -> Examples:
    """Tokenise rows; those whose prompt alone fills `max_length` have nothing to score and are left out."""
    kept: list[tuple[list[int], int]] = []
    dropped = 0
    for row in rows:
        ids, first = tokenise_row(row, tokenizer, max_length, mask_prompt)
        if first < len(ids):
            kept.append((ids, first))
        else:
            dropped += 1
    if dropped:
        log.info("%d instruction rows left out: their prompt fills `max_length: %d`", dropped, max_length)
    width = max((len(ids) for ids, _ in kept), default=0)
    tokens = torch.zeros(len(kept), width, dtype=torch.int32)
    for index, (ids, _) in enumerate(kept):
        tokens[index, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    first_scored = torch.tensor([first for _, first in kept], dtype=torch.int64)
    return Examples(tokens, first_scored, torch.tensor([len(ids) for ids, _ in kept], dtype=torch.int64))


def split(examples: Examples, tuning: Tuning) -> tuple[Examples, Examples]:
    """Training and validation rows: a shuffle with a fixed seed, the first `validation_examples` for validation.

    Raises:
        RankwiseError: too few rows for the validation set and one batch.
    """
    needed = tuning.validation_examples + tuning.batch_size
    if len(examples) < needed:
        raise RankwiseError(
            f"instructions '{tuning.instructions}': {len(examples)} usable rows, but `validation_examples: "
            f"{tuning.validation_examples}` and one batch (`batch_size: {tuning.batch_size}`) need {needed}. "
            "Lower them, raise `max_length` if rows were left out, or take a larger data set."
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation = order[: tuning.validation_examples]
    return examples.rows(order[tuning.validation_examples :]), examples.rows(validation)
