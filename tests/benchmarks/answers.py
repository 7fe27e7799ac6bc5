"""Scoring answers in batches by tokens and by lm-eval's own class, against a forward pass of as many tokens.

Run as `python -m tests.benchmarks.answers [result.json]`. All ways score the same answers with the same random model,
stand in one process and take turns, so that whatever else a machine does falls on all of them; a ratio is that of two
times of one turn. The forward pass is of rows of one length, without padding and without the head.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank.config.suites import ZeroShotSuite
from lowrank.evaluation.answer_scorer import AnswerScorer
from lowrank.model.losses import last_hidden
from tests import tiny
from tests.benchmarks.measuring import Row, Setting, in_turns, on, random_model, ratios, row_of

CONTEXTS, ANSWERS, TURNS = 30, 4, 3
SHORTEST, LONGEST = 20, 110
"""Tokens of a context with its answer."""
BATCHES = (1024, 2048, 4096)
ROW = 128
"""Tokens of a row of the forward pass that is compared with."""
FORWARD, STOCK, ALONE = "forward pass", "lm-eval, batches of 8 texts", "each answer with its context"


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Of SmolLM2-135M's width, random weights; 2 of its 30 blocks, and as large a share of its vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(vocabulary, 3280),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_requests(vocabulary: int, contexts: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Answers of two to five tokens to contexts of all lengths, as lm-eval hands them on."""
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        found: list[int] = torch.randint(5, vocabulary, (count,), generator=draw).tolist()
        return found

    requests = []
    for _ in range(contexts):
        context = ids(int(torch.randint(SHORTEST - 5, LONGEST - 5, (1,), generator=draw)))
        for number in range(ANSWERS):
            requests.append((("", ""), context, ids(2 + number)))
    return requests


def measure(model: Any, contexts: int, sizes: Sequence[int], turns: int) -> dict[str, list[float]]:
    """Way of scoring -> the ratios of its time to that of the forward pass of as many tokens, one a turn."""
    tokenizer, device = tiny.tokenizer(), str(model.device.type)
    requests = make_requests(len(tokenizer), contexts)
    tokens = sum(len(context) + len(answer) - 1 for _, context, answer in requests)
    rows = torch.randint(5, len(tokenizer), (-(-tokens // ROW), ROW), device=device)
    settings = {"pretrained": model, "tokenizer": tokenizer, "max_length": 512}

    @torch.inference_mode()
    def forward() -> None:
        for part in rows.split(max(1, sizes[-1] // ROW)):
            last_hidden(model, part)

    ways: dict[str, Callable[[], Any]] = {FORWARD: forward}
    for size in sizes:
        scorer = AnswerScorer(**settings)
        scorer.batch_tokens = size
        ways[f"batches of {size} tokens"] = lambda scorer=scorer: scorer._loglikelihood_tokens(requests)
    alone = AnswerScorer(**settings)
    alone.batch_tokens, alone.longest_row = sizes[-1], 1
    ways[ALONE] = lambda: alone._loglikelihood_tokens(requests)
    stock = HFLM(**settings, batch_size=8)
    ways[STOCK] = lambda: stock._loglikelihood_tokens(requests, disable_tqdm=True)
    times = in_turns(ways, turns, device)
    padding = tokens / rows.numel()  # the last row is filled up
    return {name: [ratio / padding for ratio in ratios(times, name, FORWARD)] for name in ways if name != FORWARD}


def rows(setting: Setting) -> list[Row]:
    """The suite's default and lm-eval's own way, for each dtype."""
    default, size, found = int(ZeroShotSuite.model_fields["batch_tokens"].default), setting.size, []
    for dtype in setting.dtypes:
        measured = measure(random_model(size, dtype, setting.device), size.contexts, [default], min(size.turns, 3))
        for name, values in measured.items():
            target = None if name in (STOCK, ALONE) else on(setting, 1.3, 1.5)
            found.append(row_of(f"zero-shot, {name} / forward pass", values, dtype, target=target))
    return found


def main(arguments: list[str]) -> None:
    """Measure, print a table, write a JSON if a file is named."""
    torch.set_num_threads(1)
    found = measure(make_model(len(tiny.tokenizer())), CONTEXTS, BATCHES, TURNS)
    print(f"{CONTEXTS * ANSWERS} answers, {TURNS} turns, one thread: median of the ratios (middle half)")
    for row in (row_of(name, values) for name, values in found.items()):
        print(f"{row.measure:28} {row.median:.2f} ({row.low:.2f} to {row.high:.2f})")
    if arguments:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        Path(arguments[0]).write_text(json.dumps({"ratios": found} | about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
