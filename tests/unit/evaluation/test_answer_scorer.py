"""Log-likelihoods of answers are those of stock lm-eval, whatever the batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
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
from lowrank.evaluation.answer_scorer import (
    AnswerScorer,
    Ending,
    Layout,
    Reading,
    Request,
    batches,
    make_readings,
    score,
)
from lowrank.evaluation.zero_shot import evaluate_zero_shot
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import spread
from tests import pretended, tiny
from tests.unit.evaluation.test_zero_shot import METRICS, ROWS, make_suite, model, tokenizer, write_rows
from tests.unit.model import factor_samples

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
    ("x", " yes"),
    ("x", " no"),
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

    def small(one: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        if len(ids) > 1 or "attention_mask" in given:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(ids))
        return last_hidden(one, ids, **given)

    monkeypatch.setattr(answer_scorer, "last_hidden", small)
    found = scores(scorer_of(model, tokenizer, 9999, max_length=512))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-5)
    assert sizes == [1] * len({context + answer for context, answer in PAIRS}), "rows first, then their endings"

    def full(one: Any, ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
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


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 90), st.sampled_from([1, 20, 9999]))
def test_batches_hold_all_in_order_and_no_more_than_they_may(lengths: list[int], tokens: int, small: int) -> None:
    readings = [Reading(tuple(range(length)), [Ending(())]) for length in sorted(lengths, reverse=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_scorer, "SMALL_BATCH", small)
        made = list(batches(readings, tokens))
    assert [reading for batch in made for reading in batch] == readings
    assert all(len(batch) == 1 or len(batch) * len(batch[0]) <= tokens for batch in made)
    for batch, after in pairwise(made):
        mostly_padding = len(batch) * len(batch[0]) >= small and len(after[0]) < 0.875 * len(batch[0])
        assert (len(batch) + 1) * len(batch[0]) > tokens or mostly_padding, "one more would have had room"
    for batch in made:
        for size, row in enumerate(batch):
            assert size * len(batch[0]) < small or len(row) >= 0.875 * len(batch[0])


def requests_of(texts: Sequence[tuple[list[int], list[int]]]) -> list[Request]:
    return [(("", ""), context, answer) for context, answer in texts]


def test_equal_texts_are_read_once_and_long_ones_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    texts = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([9, 8, 7, 6, 5], [4])]
    readings = make_readings(requests_of(texts), 3, 3)
    same = Ending((), [(0, [3]), (1, [4]), (2, [2, 5])])
    assert readings == [Reading((7, 6, 5), [Ending((), [(3, [4])])]), Reading((1, 2), [same])]
    assert "1 of 4 texts are longer than 3 tokens: read without their beginning" in caplog.text


TEXTS = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=5), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
)


@given(TEXTS, st.integers(4, 9), st.integers(1, 20) | st.just(999))
def test_a_context_is_read_once_as_long_as_its_row_is_short(
    texts: list[tuple[list[int], list[int]]], longest: int, shared: int
) -> None:
    rows = make_readings(requests_of(texts), longest, shared)
    assert all(len(row) <= shared or len(row.endings) == 1 for row in rows)
    whole = [row.context + ending.tokens for row in rows for ending in row.endings]
    assert len(whole) == len(set(whole)), "a text is read twice"
    if shared == 999:
        assert len({row.context for row in rows}) == len(rows)
    found = {
        number: ((row.context + ending.tokens)[: -len(answer) + 1 or None], answer)
        for row in rows
        for ending in row.endings
        for number, answer in ending.answers
    }
    assert found == {
        number: (tuple((context + answer)[-(longest + 1) :][: -len(answer)]), answer)
        for number, (context, answer) in enumerate(texts)
    }


@given(TEXTS, st.integers(1, 40))
def test_a_token_of_a_row_sees_what_it_sees_alone_and_is_asked_for_what_follows(
    texts: list[tuple[list[int], list[int]]], shared: int
) -> None:
    rows = make_readings(requests_of(texts), 9, shared)
    layout = Layout.of(rows)
    seen, width = layout.mask(torch.float32)[:, 0] == 0, layout.ids.shape[1]
    places = layout.places.tolist()
    for number, answer in layout.asked:
        text = [*texts[number][0], *texts[number][1]]
        for target in range(len(answer)):
            row, at = divmod(places.pop(0), width)
            before = text[: len(text) - len(answer) + target]
            assert layout.ids[row][seen[row, at]].tolist() == before
            assert layout.positions[row][seen[row, at]].tolist() == list(range(len(before)))
    assert not places
    assert sorted(number for number, _ in layout.asked) == list(range(len(texts)))
    assert seen.any(dim=-1).all(), "a row of a mask without anything to see would be no number"


def test_contexts_are_read_once(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = [(context, answer) for context in ("One context here", "Another") for answer in (" aaa", " bb", " c")]
    read, last_hidden = [], answer_scorer.last_hidden
    caplog.set_level(logging.INFO)

    def counted(one: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        read.append(int((ids != 0).sum()))
        return last_hidden(one, ids, **given)

    monkeypatch.setattr(answer_scorer, "last_hidden", counted)
    together = scores(scorer_of(model, tokenizer, 9999, max_length=512), pairs)
    once = sum(read)
    alone = scores(scorer_of(model, tokenizer, 1, max_length=512), pairs)
    contexts = sum(len(tokenizer(context)["input_ids"]) for context in ("One context here", "Another"))
    assert sum(read) - once == once + 2 * contexts
    assert f"6 answers: {once} tokens to read, {sum(read) - once} with a context for each" in caplog.text
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3_text", "opt"])
@pytest.mark.parametrize("way", ["low rank", "neurons and heads", "in two pieces"])
def test_a_context_is_read_once_by_every_kind_of_model(kind: str, way: str) -> None:
    methods = {"low rank": "svd-llm", "neurons and heads": "flap"}
    model = tiny.model(kind).double()
    if way in methods:
        model, _ = factor_samples.compressed(methods[way], kind, 30, model=model)
    texts = [([1, 5, 7], [3, 4]), ([1, 5, 7], [6]), ([1, 5, 7], [8, 9, 2]), ([2, 2], [5, 5])]
    alone, together = (make_readings(requests_of(texts), 60, shared) for shared in (1, 30))
    assert (len(alone), len(together)) == (4, 2)
    expected = [found for row in alone for found in score(model, [row], factor_samples.CPU)]
    with pretended.Pretended() as devices:
        if way == "in two pieces":
            spread(model, family_of(model).blocks, pretended.devices(2))
        found = score(model, together, model.device)
    assert set(devices.used) == ({"lazy:0", "lazy:1"} if way == "in two pieces" else set())
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-10)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each forward pass from now on the tokens of a row, and whether there was a mask."""
    passes, last_hidden = [], answer_scorer.last_hidden

    def note(model: Any, ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        passes.append((ids.shape[1], "attention_mask" in given))
        return last_hidden(model, ids, **given)

    monkeypatch.setattr(answer_scorer, "last_hidden", note)
    return passes


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "phi3"])
def test_what_a_sliding_window_cuts_off_is_cut_off_beside_rows_of_several_endings(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = tiny.tokenizer()
    one = tiny.model(kind, len(vocabulary)).double()
    pairs = [("A prompt of some words", " yes"), ("A prompt of some words", " no"), ("x", " yes"), ("x", " no")]
    window = 9
    monkeypatch.setattr(one.config, "sliding_window", window)
    assert len(vocabulary(pairs[0][0])["input_ids"]) > window > len(vocabulary("x yes no")["input_ids"])
    alone = scores(scorer_of(one, vocabulary, 1, max_length=60), pairs)
    passes = noted(monkeypatch)
    together = scores(scorer_of(one, vocabulary, 9999, max_length=60), pairs)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-9)
    assert {masked for _, masked in passes} == {True, False}
    assert all(length <= window for length, masked in passes if masked)


def test_no_row_has_more_tokens_than_the_model_has_positions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("A prompt of some words", f" {answer * 8}") for answer in "abcdef"]
    longest = len(tokenizer(f"{pairs[0][0]}{pairs[0][1]}")["input_ids"])
    whole = scores(scorer_of(model, tokenizer, 9999, max_length=longest), pairs)
    monkeypatch.setattr(model.config, "max_position_embeddings", longest + 5)
    passes = noted(monkeypatch)
    found = scores(scorer_of(model, tokenizer, 9999, max_length=longest), pairs)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], rel=1e-5)
    assert max(length for length, _ in passes) <= longest + 5


@pytest.mark.parametrize("empty", [([], [3]), ([1, 2], [])])
def test_an_answer_without_tokens_or_behind_none_is_refused(empty: tuple[list[int], list[int]]) -> None:
    with pytest.raises(RankwiseError, match="one of them has no tokens"):
        make_readings(requests_of([([1], [2]), empty]), 9, 9)


def test_an_answer_longer_than_the_context_is_refused() -> None:
    assert make_readings(requests_of([([1], [3, 4, 5])]), 3, 3)
    with pytest.raises(RankwiseError, match=r"an answer of 4 tokens does not fit a context of 3; raise .*`max_length`"):
        make_readings(requests_of([([1], [3, 4, 5, 6])]), 3, 3)
