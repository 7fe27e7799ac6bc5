"""Greedy continuations of prompts, one token at a time with the KV cache.

Protocol. Each prompt is read on its own (no padding, so no prompt changes another's result), with the BOS token first
if the tokenizer starts texts with it. The next token is always the most probable one, the smallest id among equals,
until an end-of-text token or `new_tokens` of them. Nothing is sampled, and settings of the checkpoint such as a
temperature or a repetition penalty are not used.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.calibration.corpora import default_bos
from lowrank.config.suites import GenerationSuite
from lowrank.errors import RankwiseError

log = logging.getLogger(__name__)


def continue_prompts(
    model: PreTrainedModel, tokenizer: Any, suite: GenerationSuite, max_length: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Continue each prompt of a suite.

    Args:
        model: in evaluation mode, on the device that computes.
        tokenizer: the model's.
        suite: prompts and number of new tokens.
        max_length: the longest context of the model, in tokens.

    Returns:
        One entry a prompt: "prompt", "completion" (text), "tokens" (how many were generated, the end of text not
        counted), "token_ids" (these), "ended" (whether an end-of-text token came); and what else defines the texts.

    Raises:
        RankwiseError: a prompt without tokens, prompt and continuation longer than `max_length` or than the model
            was made for, or logits that are not finite.
    """
    bos, ends = default_bos(tokenizer), end_tokens(model, tokenizer)
    begin = [] if bos is None else [bos]
    read = [[*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in suite.prompts]
    positions = getattr(model.config, "max_position_embeddings", max_length)
    for index, ids in enumerate(read):
        _check(ids, suite.new_tokens, max_length, positions, f"prompts[{index}]")
    completions = []
    for index, (prompt, ids) in enumerate(zip(suite.prompts, read, strict=True)):
        new, ended = continue_greedily(model, ids, suite.new_tokens, ends)
        completions.append(
            {
                "prompt": prompt,
                "completion": _text_after(tokenizer, ids, new),
                "tokens": len(new),
                "token_ids": new,
                "ended": ended,
            }
        )
        log.info("%d of %d prompts, %d new tokens", index + 1, len(suite.prompts), len(new))
    protocol = {
        "decoding": "greedy: the most probable token, the smallest id among equals",
        "cache": "keys and values",
        "batch_size": 1,
        "bos_token": bos,
        "end_tokens": sorted(ends),
    }
    return completions, protocol


@torch.inference_mode()
def continue_greedily(
    model: PreTrainedModel, prompt: list[int], new_tokens: int, ends: frozenset[int]
) -> tuple[list[int], bool]:
    """The most probable token, again and again.

    Args:
        model: in evaluation mode.
        prompt: token ids, at least one.
        new_tokens: how many at most.
        ends: tokens that end a text.

    Returns:
        The new token ids, without the one that ended the text, and whether one did.

    Raises:
        RankwiseError: logits that are not finite.
    """
    ids, cache = torch.tensor([prompt]).to(model.device), None
    new: list[int] = []
    while len(new) < new_tokens:
        state = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = state.logits[0, -1], state.past_key_values
        if not bool(logits.isfinite().all()):
            raise RankwiseError(
                f"the logits after {len(prompt) + len(new)} tokens are not finite. Set `dtype: float32` for this model "
                "in the config, or look at the checkpoint: its weights may be damaged."
            )
        token = int(logits.argmax())  # of the first maximum
        if token in ends:
            return new, True
        new.append(token)
        ids = torch.tensor([[token]]).to(model.device)
    return new, False


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer, the configuration and the generation settings of a model."""
    named = (
        tokenizer.eos_token_id,
        getattr(model.config, "eos_token_id", None),
        getattr(model.generation_config, "eos_token_id", None),
    )
    return frozenset(
        token for value in named if value is not None for token in (value if isinstance(value, list) else [value])
    )


def _check(ids: list[int], new_tokens: int, max_length: int, positions: int, place: str) -> None:
    if not ids:
        raise RankwiseError(f"{place}: the tokenizer makes no token of it; write more, or leave it out.")
    if len(ids) + new_tokens > min(max_length, positions):
        limit = f"`max_length` ({max_length})" if max_length <= positions else f"positions ({positions})"
        raise RankwiseError(
            f"{place}: {len(ids)} tokens and `new_tokens: {new_tokens}` are more than the model's {limit}; shorten one "
            "of them."
        )


def _text_after(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """What the new tokens add to the prompt's text: decoded alone, some tokenizers lose the space before a word."""
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if whole.startswith(before):
        return str(whole[len(before) :])
    # the prompt ends inside a character, which the new tokens complete
    return str(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
