"""Chunked losses against the same quantities from full logits in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.model.losses import draw_tokens, head_of, last_hidden, token_kl, token_nll, token_nll_and_kl

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA_LIKE = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**LLAMA_LIKE),
    "qwen2": transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "olmo2": transformers.Olmo2Config(**LLAMA_LIKE),
    "gemma3_text": transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8),
    "gemma3_text with bounded logits": transformers.Gemma3TextConfig(
        **LLAMA_LIKE, head_dim=8, initializer_range=0.5, final_logit_softcapping=1.5
    ),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16),
}
shapes = {
    "tokens": st.integers(1, 40),
    "width": st.integers(1, 12),
    "vocabulary": st.integers(2, 60),
    "chunk": st.integers(1, 50),
    "seed": st.integers(0, 2**16),
}


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_run() -> None:
    torch.manual_seed(0)


def tiny_model(config: transformers.PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return model


def random_case(tokens: int, width: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    head.weight.copy_(2 * torch.randn(vocabulary, width, generator=generator))
    return (
        torch.randn(tokens, width, generator=generator),
        head,
        torch.randint(vocabulary, (tokens,), generator=generator),
    )


def exact_log_probabilities(hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    return logits - torch.logsumexp(logits, dim=1, keepdim=True)


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@settings(deadline=None, max_examples=60)
@given(**shapes)
def test_nll_equals_that_of_full_logits(tokens: int, width: int, vocabulary: int, chunk: int, seed: int) -> None:
    hidden, head, targets = random_case(tokens, width, vocabulary, seed)
    expected = -exact_log_probabilities(hidden, head)[torch.arange(tokens), targets]
    found = token_nll(hidden, head, targets.int(), chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(**shapes, other_width=st.integers(1, 12))
def test_kl_equals_that_of_full_logits(
    tokens: int, width: int, other_width: int, vocabulary: int, chunk: int, seed: int
) -> None:
    hidden_p, head_p, _ = random_case(tokens, width, vocabulary, seed)
    hidden_q, head_q, _ = random_case(tokens, other_width, vocabulary, seed + 1)
    expected = exact_kl(exact_log_probabilities(hidden_p, head_p), exact_log_probabilities(hidden_q, head_q))
    found = token_kl(hidden_p, head_p, hidden_q, head_q, chunk)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert token_kl(hidden_p, head_p, hidden_p, head_p, chunk).tolist() == [0.0] * tokens


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_both_in_one_pass(direction: str, tokens: int, width: int, vocabulary: int, chunk: int, seed: int) -> None:
    hidden, head, targets = random_case(tokens, width, vocabulary, seed)
    reference = random_case(tokens, width, vocabulary, seed + 1)[0]
    nll, kl = token_nll_and_kl(hidden, reference, head, targets, chunk, direction)
    torch.testing.assert_close(nll, token_nll(hidden, head, targets), rtol=1e-5, atol=1e-5)
    model, dense = exact_log_probabilities(hidden, head), exact_log_probabilities(reference, head)
    expected = exact_kl(model, dense) if direction == "reverse" else exact_kl(dense, model)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-4)


def test_kl_is_of_the_first_model_to_the_second() -> None:
    sure, torn = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    head = nn.Linear(2, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(2))
    assert float(token_kl(sure, head, torn, head)) == pytest.approx(0.69264, abs=1e-4)  # near log 2
    assert float(token_kl(torn, head, sure, head)) == pytest.approx(4.30690, abs=1e-4)  # half of 10, less log 2


def test_logits_of_at_most_one_chunk_exist() -> None:
    hidden, head, targets = random_case(tokens=10, width=4, vocabulary=7, seed=0)
    sizes: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))
    token_nll(hidden, head, targets, chunk=4)
    assert sizes == [4, 4, 2]


def test_half_precision_keeps_a_float32_softmax() -> None:
    hidden, head, targets = random_case(tokens=6, width=8, vocabulary=30, seed=1)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    expected = torch.nn.functional.cross_entropy(head(hidden).double(), targets, reduction="none")
    torch.testing.assert_close(token_nll(hidden, head, targets).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_by_their_probabilities(dtype: torch.dtype) -> None:
    """Counts of 20,000 draws within five standard errors, and a logit that cannot be is never drawn."""
    draw, count = torch.Generator().manual_seed(0), 20_000
    head = nn.Linear(3, 7, bias=False).to(dtype)
    head.weight.data = torch.randn(7, 3, generator=draw).to(dtype)
    head.weight.data[5] = -torch.inf
    state = torch.tensor([[0.5, 1.0, 1.5]], dtype=dtype)
    p = torch.softmax(head(state)[0].double(), dim=-1)
    found = torch.bincount(draw_tokens(state.expand(count, 3), head, draw), minlength=7)
    assert found[5] == 0
    assert bool(((found - count * p).abs() <= 5 * (count * p * (1 - p)).sqrt()).all())


def test_no_tokens_give_no_losses() -> None:
    hidden, head, targets = random_case(tokens=1, width=4, vocabulary=7, seed=0)
    assert token_nll(hidden[:0], head, targets[:0]).shape == (0,)


@pytest.mark.parametrize("family", CONFIGS)
def test_hidden_states_are_what_the_head_reads(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    ids = torch.randint(50, (2, 9))
    torch.testing.assert_close(head_of(model)(last_hidden(model, ids)), model(ids).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_of_a_model_in_float64(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    ids = torch.randint(50, (2, 9))
    hidden = last_hidden(model, ids)[:, :-1].flatten(0, 1)
    nll = token_nll(hidden, head_of(model), ids[:, 1:].flatten(), chunk=5)
    logits = model.double()(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_more_tokens_than_the_model_reads_are_refused(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    last_hidden(model, torch.zeros(1, 32, dtype=torch.long))
    with pytest.raises(RankwiseError, match="windows of 33 tokens, but the model reads at most 32; lower `length`"):
        last_hidden(model, torch.zeros(1, 33, dtype=torch.long))


def test_opt_with_projected_embeddings_is_refused() -> None:
    model = tiny_model(transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=8))
    with pytest.raises(RankwiseError, match="projection after the last block"):
        last_hidden(model, torch.zeros(1, 3, dtype=torch.long))


def test_unknown_family_is_refused() -> None:
    model = tiny_model(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(RankwiseError, match=r"gpt2`\) is unknown here"):
        last_hidden(model, torch.zeros(1, 3, dtype=torch.long))


def test_model_without_a_linear_head_is_refused() -> None:
    model = tiny_model(CONFIGS["mistral"])
    model.lm_head = nn.Identity()
    with pytest.raises(RankwiseError, match="a linear language-model head is needed, not Identity"):
        head_of(model)
