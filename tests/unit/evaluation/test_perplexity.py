"""Perplexity against direct sums over full logits, and the standard error against textbook cases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.config.suites import PerplexitySuite
from lowrank.errors import RankwiseError
from lowrank.evaluation.perplexity import WindowLosses, evaluate_corpora, evaluate_perplexity
from lowrank.files import save_tensors, sha256_file, write_json, write_text
from tests import tiny

VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run() -> None:
    torch.manual_seed(0)


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words `1` ... `39`, whose ids are the words; with `bos`, texts start with `<s>`, id 0."""
    words = {"<s>": 0} | {str(number): number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def token_losses(model: LlamaForCausalLM, window: torch.Tensor) -> list[float]:
    """Loss of each token of one window but the first, from full logits."""
    logits = model(window[None].long()).logits[0, :-1].double()
    return [float(loss) for loss in functional.cross_entropy(logits, window[1:].long(), reduction="none")]


def write_corpus(folder: Path, documents: list[str]) -> Path:
    data = folder / "data" / "c.jsonl"
    write_text(data, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    record = {"corpus": "c", "kind": "documents", "file": data.name, "sha256": sha256_file(data)}
    write_json(folder / "c.json", record)
    return folder / "c.json"


def make_suite(**settings: Any) -> PerplexitySuite:
    return PerplexitySuite.model_validate({"kind": "perplexity", "corpora": ["c"]} | settings)


@pytest.mark.parametrize("batch_tokens", [1, 14, 1000])
def test_windows_without_overlap_score_all_tokens_but_the_first(model: LlamaForCausalLM, batch_tokens: int) -> None:
    windows = torch.randint(VOCABULARY, (5, 7), dtype=torch.int32)
    losses = evaluate_perplexity(model, windows, batch_tokens=batch_tokens)
    expected = [token_losses(model, window) for window in windows]
    assert losses.tokens == (6,) * 5
    assert losses.nll == pytest.approx([sum(window) for window in expected], rel=1e-5)
    every = [loss for window in expected for loss in window]
    assert losses.perplexity == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


@settings(deadline=None, max_examples=15)
@given(length=st.integers(2, 9), share=st.floats(0, 1), count=st.integers(1, 5), seed=st.integers(0, 999))
def test_overlapping_windows_score_every_token_once(
    model: LlamaForCausalLM, length: int, share: float, count: int, seed: int
) -> None:
    stride = max(1, round(share * (length - 1)))
    stream = torch.randint(VOCABULARY, (length + (count - 1) * stride,), generator=torch.Generator().manual_seed(seed))
    windows = stream.unfold(0, length, stride)
    losses = evaluate_perplexity(model, windows, stride)
    assert sum(losses.tokens) == len(stream) - 1
    expected = [token_losses(model, window) for window in windows]
    assert losses.nll[0] == pytest.approx(sum(expected[0]), rel=1e-4)
    assert losses.nll[1:] == pytest.approx([sum(window[-stride:]) for window in expected[1:]], rel=1e-4)


def test_stderr_of_equal_windows_is_that_of_a_mean() -> None:
    means = torch.tensor([2.0, 2.5, 3.5, 4.0], dtype=torch.float64)
    losses = WindowLosses(tuple((means * 8).tolist()), (8,) * 4)
    assert losses.mean == pytest.approx(3.0)
    assert losses.stderr == pytest.approx(float(means.std()) / 2)
    summary = losses.summary()
    assert summary["perplexity"] == pytest.approx(math.exp(3.0))
    assert summary["stderr"] == pytest.approx(math.exp(3.0) * float(means.std()) / 2)
    assert summary["window_nll"] == pytest.approx(means.tolist())
    assert summary["tokens"] == 32


def test_stderr_of_unequal_windows_covers_the_spread_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(2000):
        tokens = torch.randint(5, 50, (30,), generator=generator)
        nll = tokens * (3 + torch.randn(30, generator=generator, dtype=torch.float64))
        losses = WindowLosses(tuple(nll.tolist()), tuple(tokens.tolist()))
        found.append(losses.mean)
        errors.append(losses.stderr)
    spread = float(torch.tensor(found, dtype=torch.float64).std())
    assert sum(e for e in errors if e is not None) / len(errors) == pytest.approx(spread, rel=0.06)


def test_a_single_window_has_no_stderr() -> None:
    summary = WindowLosses((6.0,), (3,)).summary()
    assert summary["stderr"] is None
    assert summary["stderr_nll"] is None
    assert summary["perplexity"] == pytest.approx(math.exp(2))


def test_a_perplexity_beyond_all_numbers_is_an_error() -> None:
    with pytest.raises(RankwiseError, match="900 nats a token has no finite perplexity"):
        _ = WindowLosses((1800.0,), (2,)).perplexity


@pytest.mark.parametrize("bos", [True, False])
def test_corpora_are_scored_as_the_suite_says(model: LlamaForCausalLM, tmp_path: Path, bos: bool) -> None:
    numbers = torch.randint(1, VOCABULARY, (40,)).tolist()
    index = write_corpus(tmp_path, [" ".join(map(str, numbers[:15])), " ".join(map(str, numbers[15:]))])
    suite = make_suite(length=8, stride=4, windows=3)
    results, protocol = evaluate_corpora(model, "m", make_tokenizer(bos), suite, [index])
    stream = torch.tensor([0, *numbers] if bos else numbers)[:16]
    expected = [token_losses(model, window) for window in stream.unfold(0, 8, 4)]
    total = sum(expected[0]) + sum(sum(window[-4:]) for window in expected[1:])
    assert results["c"]["mean_nll"] == pytest.approx(total / 15, rel=1e-5)
    assert results["c"]["window_tokens"] == [7, 4, 4]
    assert results["c"]["sha256"] == sha256_file(tmp_path / "data" / "c.jsonl")
    assert protocol["bos_token"] == (0 if bos else None)
    assert protocol["bos"] == ("once, before the first document" if bos else "nowhere")
    assert protocol["stride"] == 4
    assert "the last 4 tokens" in protocol["scored"]


@pytest.mark.parametrize(("stride", "windows"), [(None, 3), (4, 5)])
def test_a_family_that_needs_it_has_bos_in_each_window_and_still_every_token_once(
    stride: int | None, windows: int, tmp_path: Path
) -> None:
    model = tiny.model("gemma3_text")
    numbers = torch.randint(1, VOCABULARY, (30,)).tolist()
    index = write_corpus(tmp_path, [" ".join(map(str, numbers))])
    suite = make_suite(length=8, stride=stride, windows=windows)
    results, protocol = evaluate_corpora(model, "m", make_tokenizer(True), suite, [index])
    step = stride or 7
    read = [torch.tensor([0, *numbers[start : start + 7]]) for start in range(0, windows * step, step)]
    expected = [token_losses(model, window)[0 if not start else -step :] for start, window in enumerate(read)]
    assert results["c"]["window_tokens"] == [7, *[step] * (windows - 1)]
    assert results["c"]["tokens"] == 7 + step * (windows - 1)
    assert results["c"]["mean_nll"] == pytest.approx(sum(map(sum, expected)) / results["c"]["tokens"], rel=1e-5)
    assert protocol["bos"].startswith("before each window")
    _, protocol = evaluate_corpora(model, "m", make_tokenizer(False), suite, [index])
    assert protocol["bos"] == "nowhere"


def test_given_tokens_are_scored_as_they_are(model: LlamaForCausalLM, tmp_path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (4, 6), dtype=torch.int32)
    save_tensors(tmp_path / "data" / "c.safetensors", {"tokens": tokens})
    record = {"corpus": "c", "kind": "tokens", "file": "c.safetensors"}
    write_json(tmp_path / "c.json", record | {"sha256": sha256_file(tmp_path / "data" / "c.safetensors")})
    results, _ = evaluate_corpora(model, "m", make_tokenizer(True), make_suite(length=6), [tmp_path / "c.json"])
    expected = [loss for window in tokens for loss in token_losses(model, window)]
    assert results["c"]["mean_nll"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_broken_model_is_named_with_corpus_and_window(model: LlamaForCausalLM, tmp_path: Path) -> None:
    index = write_corpus(tmp_path, ["5 6 7 8 9 10 11 12"])
    broken = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    broken.load_state_dict(model.state_dict())
    broken.model.embed_tokens.weight[9] = torch.nan
    with pytest.raises(RankwiseError, match=r"folder/m on the corpus 'c': the loss on window 1 .* is not finite"):
        evaluate_corpora(broken, "folder/m", make_tokenizer(False), make_suite(length=4), [index])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.full((2, 5), VOCABULARY), r"token ids reach from 40 to 40, but the model knows 0 to 39"),
        (torch.zeros(2, 1), r"2 windows of 1 tokens hold nothing to score"),
        (torch.zeros(0, 5), r"0 windows of 5 tokens hold nothing to score"),
        (torch.zeros(1, 33), r"windows of 33 tokens, but the model reads at most 32"),
    ],
)
def test_windows_that_do_not_fit_the_model(model: LlamaForCausalLM, windows: torch.Tensor, message: str) -> None:
    with pytest.raises(RankwiseError, match=message):
        evaluate_perplexity(model, windows.int())


def test_a_short_text_names_the_corpus(model: LlamaForCausalLM, tmp_path: Path) -> None:
    index = write_corpus(tmp_path, ["5 6 7"])
    with pytest.raises(RankwiseError, match="m on the corpus 'c': the text is too short"):
        evaluate_corpora(model, "m", make_tokenizer(False), make_suite(length=4), [index])
