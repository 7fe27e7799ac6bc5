"""Greedy continuations: against whole passes without a cache in float64, and what ends or forbids them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lowrank.config.suites import GenerationSuite
from lowrank.errors import RankwiseError
from lowrank.evaluation.generation import continue_greedily, continue_prompts, end_tokens
from lowrank.model.modeling_rankwise import LowRankLinear
from tests import tiny

PROMPTS = ["The river and the stone", "A question about", "winter"]


def suite(*prompts: str, new_tokens: int = 12) -> GenerationSuite:
    return GenerationSuite(kind="generation", prompts=list(prompts or PROMPTS), new_tokens=new_tokens)


def make_model(kind: str, rank: int | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny random model; with `rank`, its output and down projections are pairs."""
    model = tiny.model(kind, len(tiny.tokenizer()), seed)
    for name, layer in list(model.named_modules()):
        if rank is not None and name.rpartition(".")[2] in ("o_proj", "out_proj", "down_proj", "fc2"):
            parent, _, child = name.rpartition(".")
            pair = LowRankLinear(layer.in_features, layer.out_features, rank, bias=True)
            for parameter in pair.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
            setattr(model.get_submodule(parent), child, pair.requires_grad_(False))
    return model


def slow_greedy(model: PreTrainedModel, prompt: list[int], new_tokens: int, ends: frozenset[int]) -> list[int]:
    """The whole text again for each token, without a cache, in float64; the gap to the second best token is checked."""
    model = model.double()
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        assert best - second > 1e-5, "too close to tell in float32: choose another seed"
        token = max(range(len(logits)), key=lambda index: float(logits[index]))
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("kind", tiny.ALL_SHAPES)
def test_the_cache_changes_nothing(kind: str, rank: int | None) -> None:
    model, tokenizer = make_model(kind, rank), tiny.tokenizer()
    completions, _ = continue_prompts(model, tokenizer, suite(), 512)
    assert [entry["prompt"] for entry in completions] == PROMPTS
    assert any(len(set(entry["token_ids"])) > 1 for entry in completions), "a model that says one thing tests little"
    for entry in completions:
        ids = tokenizer(entry["prompt"])["input_ids"]
        assert entry["token_ids"] == slow_greedy(model, ids, 12, end_tokens(model, tokenizer))
        assert entry["tokens"] == len(entry["token_ids"])


def test_prompts_do_not_touch_each_other_and_a_second_run_is_equal() -> None:
    model, tokenizer = make_model("llama-gqa", 7), tiny.tokenizer()
    together, _ = continue_prompts(model, tokenizer, suite(), 512)
    again, _ = continue_prompts(model, tokenizer, suite(), 512)
    alone = [continue_prompts(model, tokenizer, suite(prompt), 512)[0][0] for prompt in PROMPTS]
    assert together == again == alone


def test_sampling_settings_of_a_checkpoint_are_not_used() -> None:
    model, tokenizer = make_model("llama"), tiny.tokenizer()
    before, _ = continue_prompts(model, tokenizer, suite(), 512)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1)
    assert continue_prompts(model, tokenizer, suite(), 512)[0] == before


class Scripted(torch.nn.Module):
    """A model that says given tokens, one a pass, whatever it reads."""

    def __init__(self, tokens: list[int], vocabulary: int = 400, fill: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.vocabulary, self.fill, self.reads = tokens, vocabulary, fill, []
        self.device = torch.device("cpu")
        self.config = type("Config", (), {"eos_token_id": 1})()
        self.generation_config = type("Generation", (), {"eos_token_id": [1, 5]})()

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((1, 1, self.vocabulary), self.fill)
        logits[0, 0, self.tokens[len(self.reads)]] += 1
        self.reads.append(ids.tolist()[0])
        return type("Output", (), {"logits": logits, "past_key_values": ()})()


def scripted(*tokens: int, **options: Any) -> Any:
    return Scripted(list(tokens), **options)


def test_the_prompt_is_read_once_and_then_one_token_a_pass() -> None:
    model = scripted(7, 8, 9)
    assert continue_greedily(model, [3, 4], 3, frozenset()) == ([7, 8, 9], False)
    assert model.reads == [[3, 4], [7], [8]]


@pytest.mark.parametrize("end", [1, 5])
def test_an_end_of_text_ends_a_text_and_is_no_part_of_it(end: int) -> None:
    (entry,), protocol = continue_prompts(scripted(7, end, 9), tiny.tokenizer(), suite("river", new_tokens=3), 64)
    assert (entry["token_ids"], entry["tokens"], entry["ended"]) == ([7], 1, True)
    assert protocol["end_tokens"] == [1, 5]
    (entry,), _ = continue_prompts(scripted(end), tiny.tokenizer(), suite("river", new_tokens=3), 64)
    assert (entry["completion"], entry["tokens"], entry["ended"]) == ("", 0, True)


def test_of_equal_tokens_the_smallest_is_taken() -> None:
    class Level(Scripted):
        def forward(self, ids: torch.Tensor, **_: Any) -> Any:
            output = super().forward(ids)
            output.logits = torch.zeros(1, 1, self.vocabulary)
            output.logits[0, 0, [30, 20, 40]] = 1.0
            return output

    model: Any = Level([0, 0])
    assert continue_greedily(model, [3], 2, frozenset()) == ([20, 20], False)


def test_the_completion_is_what_is_added_to_the_prompt() -> None:
    tokenizer = tiny.tokenizer()
    words = tokenizer(" stone river")["input_ids"]
    (entry,), _ = continue_prompts(scripted(*words), tokenizer, suite("river", new_tokens=len(words)), 64)
    assert entry["completion"] == " stone river"
    assert not entry["ended"]


def test_a_tokenizer_that_drops_the_first_space_of_a_text_keeps_that_of_a_completion() -> None:
    """As LLaMA's does: decoded alone, the new tokens would stick to the prompt."""
    words = {"▁river": 2, "▁stone": 3, "</s>": 1}
    raw = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    assert tokenizer.decode([3]) == "stone"
    (entry,), _ = continue_prompts(scripted(3), tokenizer, suite("river", new_tokens=1), 64)
    assert entry["completion"] == " stone"


def test_a_character_that_two_tokens_make_is_not_lost() -> None:
    tokenizer = tiny.tokenizer()
    words = tokenizer("é river")["input_ids"]
    assert len(tokenizer("é")["input_ids"]) == 2, "one token a byte"
    (entry,), _ = continue_prompts(scripted(*words), tokenizer, suite("river", new_tokens=len(words)), 64)
    assert entry["completion"] == "é river"


def test_a_tokenizer_that_begins_with_bos_gets_it_once() -> None:
    tokenizer = tiny.tokenizer()
    plain = scripted(7)
    continue_prompts(plain, tokenizer, suite("river", new_tokens=1), 64)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    begun = scripted(7)
    _, protocol = continue_prompts(begun, tokenizer, suite("river", new_tokens=1), 64)
    assert begun.reads == [[0, *plain.reads[0]]]
    assert protocol["bos_token"] == 0


def test_what_cannot_be_continued_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(RankwiseError, match=r"prompts\[1\]: \d+ tokens and `new_tokens: 60` .* `max_length` \(62\)"):
        continue_prompts(scripted(), tokenizer, suite("a", "river stone winter", new_tokens=60), 62)
    with pytest.raises(RankwiseError, match=r"`new_tokens: 512` are more than the model's positions \(512\); shorten"):
        continue_prompts(make_model("llama"), tokenizer, suite("a", new_tokens=512), 4096)
    with pytest.raises(RankwiseError, match="logits after 1 tokens are not finite"):
        continue_greedily(scripted(7, fill=float("nan")), [3], 1, frozenset())
    with pytest.raises(RankwiseError, match=r"prompts\[0\]: the tokenizer makes no token of it"):
        continue_prompts(scripted(7), Mute(), suite("a", new_tokens=1), 62)


class Mute:
    """A tokenizer that knows no character."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": []}
