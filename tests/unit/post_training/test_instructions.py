"""Instruction rows: prompt format, tokens that count, truncation, split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank.config.tuning import ScaledSubspaceTuning, Tuning
from lowrank.errors import RankwiseError
from lowrank.post_training.instructions import IGNORED, Examples, prompt_of, read_rows, split, tokenise


def of_bytes(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token per byte but for pairs that are merged, and an end-of-sequence token."""
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return of_bytes()


ROW = {"instruction": "Add {these}.", "input": "1, 2", "output": "It is 3."}


def test_prompt_is_the_published_format() -> None:
    assert prompt_of(ROW) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write "
        "a response that appropriately completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Input:\n1, 2"
        "\n\n### Response:\n"
    )
    assert prompt_of({**ROW, "input": "  "}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {these}.\n\n### Response:\n"
    )


def test_the_papers_settings_are_the_defaults() -> None:
    tuning = ScaledSubspaceTuning(kind="scaled-subspace", instructions="alpaca")
    assert (tuning.rank, tuning.subspace, tuning.learning_rate) == (256, "random", 2e-3)
    assert (tuning.batch_size, tuning.steps, tuning.epochs, tuning.warmup_steps) == (64, None, 2, 100)
    assert (tuning.max_length, tuning.mask_prompt, tuning.validation_examples) == (256, True, 2000)


def test_only_the_response_and_the_end_are_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, labels = tokenise([ROW, {**ROW, "output": "3"}], tokenizer, 1000, mask_prompt=True).batch()
    assert tokenizer.decode(tokens[0]) == prompt_of(ROW) + "It is 3.<eos>"
    for index, answer in enumerate(("It is 3.<eos>", "3<eos>")):
        scored = labels[index] != IGNORED
        assert tokenizer.decode(tokens[index][scored]) == answer
        assert torch.equal(labels[index][scored], tokens[index][scored])
    everything = tokenise([ROW], tokenizer, 1000, mask_prompt=False)
    assert int(everything.scored) == int(everything.length) - 1


def test_a_token_across_the_end_of_the_prompt_is_scored() -> None:
    merging = of_bytes(("\u010a", "I"))  # a line's end, as byte-level tokenizers write it
    tokens, labels = tokenise([ROW], merging, 1000, mask_prompt=True).batch()
    assert merging.decode(tokens[0]) == prompt_of(ROW) + "It is 3.<eos>"
    assert merging.decode(tokens[0][labels[0] != IGNORED]) == "\nIt is 3.<eos>"


def test_long_rows_are_cut_and_rows_without_a_response_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = len(prompt_of(ROW))
    cut = tokenise([ROW], tokenizer, prompt + 4, mask_prompt=True)
    assert tokenizer.decode(cut.batch()[0][0]).endswith("### Response:\nIt i")
    assert int(cut.scored) == 4
    assert len(tokenise([ROW], tokenizer, prompt, mask_prompt=True)) == 0


def test_end_is_not_doubled_when_the_tokenizer_adds_it(tokenizer: PreTrainedTokenizerFast) -> None:
    class AddsEnd:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], self.eos_token_id]}

    first, second = (tokenise([ROW], t, 1000, mask_prompt=True) for t in (tokenizer, AddsEnd()))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def some_examples(rows: int) -> Examples:
    return Examples(torch.arange(rows, dtype=torch.int32)[:, None].repeat(1, 3), torch.ones(rows).long(),
                    torch.full((rows,), 3))  # fmt: skip


def test_split_is_disjoint_complete_and_always_the_same() -> None:
    tuning = Tuning(instructions="a", batch_size=4, micro_batch_size=4, validation_examples=5)
    training, validation = split(some_examples(20), tuning)
    assert len(validation) == 5
    assert len(training) == 15
    ids = [*training.tokens[:, 0].tolist(), *validation.tokens[:, 0].tolist()]
    assert sorted(ids) == list(range(20))
    assert ids != list(range(20))
    assert torch.equal(split(some_examples(20), tuning)[1].tokens, validation.tokens)
    with pytest.raises(RankwiseError, match=r"instructions 'a': 8 usable rows.*need 9"):
        split(some_examples(8), tuning)


def test_examples_survive_a_file(tmp_path: Path) -> None:
    examples = some_examples(4)
    examples.save(tmp_path / "e.safetensors")
    again = Examples.load(tmp_path / "e.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(vars(examples).values(), vars(again).values(), strict=True))


def test_rows_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = "one\u2028line"
    lines = [{"instruction": odd, "output": "x"}, {"instruction": "b", "input": None, "output": 3}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    assert read_rows(path) == [
        {"instruction": odd, "input": "", "output": "x"},
        {"instruction": "b", "input": "", "output": "3"},
    ]
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', encoding="utf-8")
    with pytest.raises(RankwiseError, match=r"rows.jsonl, line 2: no instruction row.*'output'"):
        read_rows(path)
    with pytest.raises(RankwiseError, match="cannot be read"):
        read_rows(tmp_path / "absent.jsonl")
