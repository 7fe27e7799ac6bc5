"""Log-likelihoods of answers are those of stock lm-eval, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.errors import RankwiseError
from lowrank.evaluation import answer_scorer
from lowrank.evaluation.answer_scorer import AnswerScorer, Reading, batches, make_readings
from lowrank.evaluation.zero_shot import evaluate_zero_shot
from tests import tiny
from tests.unit.evaluation.test_zero_shot import METRICS, ROWS, make_suite, model, tokenizer, write_rows

__all__ = ["model", "tokenizer"]  # fixtures

PAIRS = [
    ("A prompt", " yes"),
    ("A prompt", " no"),
    ("A prompt", " n"),
    ("A much longer prompt than the others", " y"),
    ("", "nothing before"),
    ("Ends in padding", " <pad><pad>"),
    ("<pad><pad>", "<pad>"),
    ("x", "a long answer"),
    ("A prompt", " no"),
]


def scores(scorer: HFLM, pairs: Sequence[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    requests = [lm_eval.api.instance.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers: list[tuple[float, bool]] = scorer.loglikelihood(requests, disable_tqdm=True)
    return answers


def scorer_of(model: Any, tokenizer: Any, batch_tokens: int, **settings: Any) -> AnswerScorer:
    scorer = AnswerScorer(pretrained=model, tokenizer=tokenizer, **settings)
    scorer.batch_tokens = batch_tokens
    return scorer


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("longest", [24, 512])
@pytest.mark.parametrize(("batch_tokens", "chunk"), [(1, 256), (40, 256), (9999, 7)])
def test_answers_score_as_in_stock_lm_eval(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    bos: bool,
    longest: int,
    batch_tokens: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(answer_scorer, "CHUNK_TOKENS", chunk)
    settings: dict[str, Any] = {"max_length": longest, "add_bos_token": bos}
    expected = scores(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **settings))
    found = scores(scorer_of(model, tokenizer, batch_tokens, **settings))
    assert [answer for answer, _ in found] == pytest.approx([answer for answer, _ in expected], rel=1e-6, abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("family", tiny.ALL_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_moves_no_answer_of_any_family(family: str, dtype: torch.dtype) -> None:
    """OPT counts positions from its mask, and heads that share keys pad them: neither may see what is on the right."""
    vocabulary = tiny.tokenizer()
    one = tiny.model(family, len(vocabulary)).to(dtype)
    alone, together = (scores(scorer_of(one, vocabulary, tokens, max_length=60)) for tokens in (1, 9999))
    # A padded batch may use other kernels: the last digits of the dtype.
    near = 1e-5 if dtype == torch.float32 else 0.05
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=near, abs=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_document_scores_as_in_batches_of_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype
) -> None:
    rows = {task: write_rows(tmp_path, task, ROWS[task]) for task in ("hellaswag", "arc_easy", "boolq")}
    tasks = {task: METRICS[task] for task in rows}
    cast = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    cast.load_state_dict(model.state_dict())
    cast.to(dtype)
    alone, together = (
        evaluate_zero_shot(cast, tokenizer, make_suite(tasks, batch_tokens=tokens), rows, 512)["tasks"]
        for tokens in (1, 9999)
    )
    for task in tasks:
        assert together[task]["scores"] == alone[task]["scores"]
        assert together[task].get("auc") == alone[task].get("auc")


def test_a_batch_that_does_not_fit_is_halved(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(scorer_of(model, tokenizer, 9999, max_length=512))
    sizes, last_hidden = [], answer_scorer.last_hidden

    def small(one: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(ids))
        return last_hidden(one, ids)

    monkeypatch.setattr(answer_scorer, "last_hidden", small)
    found = scores(scorer_of(model, tokenizer, 9999, max_length=512))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-5)
    assert sum(sizes) == len({context + answer for context, answer in PAIRS})

    def full(one: Any, ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"CUDA out of memory for {len(ids)}")

    monkeypatch.setattr(answer_scorer, "last_hidden", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"for 1$"):
        scores(scorer_of(model, tokenizer, 9999, max_length=512))


def test_the_head_reads_answers_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    scores(scorer_of(model, tokenizer, 9999, max_length=512, add_bos_token=False))
    assert sum(read) == sum(len(tokenizer(answer)["input_ids"]) - 1 for _, answer in PAIRS)


def test_one_text_cut_at_two_places_is_one_reading(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Which stock lm-eval gets wrong: it takes the shorter answer's values from where the longer one begins."""
    pairs = [("A promp", "t n"), ("A promp", "t"), ("A prompt", " n")]
    (both, _), (first, _), (second, _) = scores(scorer_of(model, tokenizer, 9999, max_length=512), pairs)
    assert both == pytest.approx(first + second, rel=1e-6)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 90))
def test_batches_hold_all_in_order_and_no_more_than_they_may(lengths: list[int], tokens: int) -> None:
    readings = [Reading(tuple(range(length))) for length in sorted(lengths, reverse=True)]
    made = list(batches(readings, tokens))
    assert [reading for batch in made for reading in batch] == readings
    assert all(len(batch) == 1 or len(batch) * len(batch[0].tokens) <= tokens for batch in made)
    full = [len(batch) + 1 for batch in made[:-1]]
    assert all(size * len(batch[0].tokens) > tokens for size, batch in zip(full, made, strict=False))


def test_equal_texts_are_read_once_and_long_ones_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    texts = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([9, 8, 7, 6, 5], [4])]
    readings = make_readings([(("", ""), context, answer) for context, answer in texts], 3)
    assert readings == [Reading((7, 6, 5), [(3, [4])]), Reading((1, 2), [(0, [3]), (1, [4]), (2, [2, 5])])]
    assert "1 of 4 texts are longer than 3 tokens: read without their beginning" in caplog.text


def test_an_answer_longer_than_the_context_is_refused() -> None:
    assert make_readings([(("", ""), [1], [3, 4, 5])], 3)
    with pytest.raises(RankwiseError, match=r"an answer of 4 tokens does not fit a context of 3; raise .*`max_length`"):
        make_readings([(("", ""), [1], [3, 4, 5, 6])], 3)
