"""Tokenizers in GGUF files: tokens, their kinds, and llama.cpp's name for how text is split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lowrank.errors import RankwiseError
from lowrank.export.gguf_tokenizer import add_tokenizer
from tests import tiny

QWEN2 = PRETOKENIZE_REGEX
LLAMA3 = TikTokenConverter().pattern
plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
digits = pre_tokenizers.Digits(individual_digits=True)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def fields(tokenizer: PreTrainedTokenizerFast, folder: Path, vocabulary: int) -> dict[str, Any]:
    """What a file with this tokenizer says of it."""
    tokenizer.save_pretrained(folder)
    return fields_of(folder, vocabulary)


def fields_of(folder: Path, vocabulary: int) -> dict[str, Any]:
    writer = gguf.GGUFWriter(folder / "t.gguf", "llama")
    add_tokenizer(writer, folder, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / "t.gguf").fields.items()}


def test_tokens_stand_at_their_places(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("more", special=False)])
    tokenizer.chat_template = "{{ messages }}"
    found = fields(tokenizer, tmp_path, len(tokenizer) + 2)
    texts, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert texts[:-2] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control, user, unused, normal = (gguf.TokenType[name] for name in ("CONTROL", "USER_DEFINED", "UNUSED", "NORMAL"))
    assert kinds[:2] == [control, control]
    assert kinds[-3:] == [user, unused, unused]
    assert set(kinds[2:-3]) == {normal}
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    merges = [" ".join(pair) for pair in _model(tokenizer)["merges"]]
    assert found["tokenizer.ggml.merges"] == merges


def test_without_a_tokenizer_json_the_message_says_how_to_make_one(tmp_path: Path) -> None:
    model, checkpoint, another = _model(tiny.tokenizer()), tmp_path / "checkpoint", tmp_path / "another"
    checkpoint.mkdir()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    (checkpoint / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(RankwiseError, match=r"checkpoint: has no `tokenizer\.json`.*`AutoTokenizer`, `save_pre"):
        fields_of(checkpoint, 500)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(another)
    shutil.copy(another / "tokenizer.json", checkpoint)
    assert fields_of(checkpoint, 500)["tokenizer.ggml.pre"] == "gpt-2"


def test_a_special_token_without_an_embedding_is_left_out(tmp_path: Path) -> None:
    """As the one for images in the tokenizer of Gemma's text models."""
    tokenizer = tiny.tokenizer()
    count = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    texts = fields(tokenizer, tmp_path, count)["tokenizer.ggml.tokens"]
    assert texts == tokenizer.convert_ids_to_tokens(range(count))
    trained = _model(tiny.tokenizer())["vocab"]  # special tokens may stand among those of a trained vocabulary too
    few = max(trained.values())
    assert fields(tiny.tokenizer(), tmp_path, few)["tokenizer.ggml.tokens"] == texts[:few]


def _model(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:

    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return found


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [split(QWEN2), plain_bytes],
    "llama-bpe": [split(LLAMA3), plain_bytes],
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_known_way_to_split_has_its_name(name: str, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name])
    assert fields(tokenizer, tmp_path, len(tokenizer))["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    "steps", [[split(r"\d"), plain_bytes], [pre_tokenizers.ByteLevel(add_prefix_space=True)], [plain_bytes]]
)
def test_any_other_way_is_refused(steps: list[Any], tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(RankwiseError, match=r"tokenizer\.json: how it splits text .* has no name here"):
        fields(tokenizer, tmp_path, len(tokenizer))


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BEGINNINGS: dict[str, tuple[Any, Any, bool]] = {  # normaliser, pre-tokeniser, whether a space is put before the text
    "prepended": (PREPENDED, None, True),
    "always": (None, pre_tokenizers.Sequence([metaspace("always")]), True),
    "first": (None, metaspace("first"), True),
    "never": (None, metaspace("never"), False),
    "as it is": (normalizers.Replace(" ", "▁"), None, False),
}


def sentencepiece(
    merges: list[tuple[str, str]], pieces: list[str], beginning: str = "prepended"
) -> PreTrainedTokenizerFast:
    """A vocabulary as that of Llama 2: unknown, control, bytes, pieces in the order of merging, letters."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁", "a", "b", "c"]
    places = {piece: place for place, piece in enumerate(vocabulary)}
    raw = Tokenizer(models.BPE(places, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer, _ = BEGINNINGS[beginning]
    if normalizer:
        raw.normalizer = normalizer
    if pre_tokenizer:
        raw.pre_tokenizer = pre_tokenizer
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_pieces_have_scores_in_the_order_of_merging(tmp_path: Path) -> None:
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    found = fields(sentencepiece(merges, ["▁a", "bc", "▁abc"]), tmp_path, 266)
    assert found["tokenizer.ggml.model"] == "llama"
    scores, kinds = found["tokenizer.ggml.scores"], found["tokenizer.ggml.token_type"]
    first, second, third = (found["tokenizer.ggml.tokens"].index(piece) for piece in ("▁a", "bc", "▁abc"))
    assert scores[first] > scores[second] > scores[third]
    names = [gguf.TokenType(kinds[place]).name for place in (0, 1, 2, 3, 258, first)]
    assert names == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE", "BYTE", "NORMAL"]
    assert found["tokenizer.ggml.add_space_prefix"] is True


def test_merges_may_be_written_as_strings(tmp_path: Path) -> None:
    as_pairs = fields(sentencepiece([("▁", "a"), ("b", "c")], ["▁a", "bc"]), tmp_path, 265)
    file = tmp_path / "tokenizer.json"
    record = json.loads(file.read_text())
    record["model"]["merges"] = [" ".join(pair) for pair in record["model"]["merges"]]
    file.write_text(json.dumps(record))
    assert fields_of(tmp_path, 265) == as_pairs


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_text_begins_with_a_space_where_the_tokenizer_puts_one(beginning: str, tmp_path: Path) -> None:
    tokenizer, (*_, expected) = sentencepiece([("▁", "a")], ["▁a"], beginning), BEGINNINGS[beginning]
    assert tokenizer.tokenize("a") == (["▁a"] if expected else ["a"])
    assert fields(tokenizer, tmp_path, 264)["tokenizer.ggml.add_space_prefix"] is expected


def test_pieces_in_another_order_are_refused(tmp_path: Path) -> None:
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    with pytest.raises(RankwiseError, match="do not stand in the order in which they are merged"):
        fields(sentencepiece(merges, ["▁abc", "bc", "▁a"]), tmp_path, 266)


def test_only_pairs_of_bytes_are_written(tmp_path: Path) -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(RankwiseError, match="a WordLevel tokenizer"):
        fields(PreTrainedTokenizerFast(tokenizer_object=raw), tmp_path, 2)
