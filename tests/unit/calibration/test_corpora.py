"""Windows of token ids: exact shapes, reproducible, without overlap, and only text of the corpus."""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowrank.calibration import corpora
from lowrank.calibration.corpora import (
    consecutive_windows,
    default_bos,
    first_windows,
    load_documents,
    sample_calibration,
    sample_windows,
    token_hash,
)
from lowrank.config.presets import Calibration
from lowrank.config.sources import Corpus
from lowrank.errors import RankwiseError
from lowrank.sources.texts import fetch_corpus

WORDS = [f"w{number}" for number in range(200)]
BOS, EOS = 0, 1


@cache
def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    return build_tokenizer(bos)


def build_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the words; with `bos`, texts start with it by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=16,
        clean_up_tokenization_spaces=False,
    )


def make_documents(count: int, words: int) -> list[str]:
    """Documents in which every word occurs once in the corpus, so that overlap of windows shows."""
    return [" ".join(f"w{index * words + word}" for word in range(words)) for index in range(count)]


def encode(text: str) -> list[int]:
    ids: list[int] = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def packed(documents: list[str]) -> list[int]:
    """The reference: all documents, each ended by EOS, one after the other."""
    return [token for text in documents for token in [*encode(text), EOS]]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 8),
    words=st.integers(1, 25),
    length=st.integers(2, 12),
    windows=st.integers(1, 6),
    seed=st.integers(0, 5),
    bos=st.booleans(),
)
def test_sampled_windows_are_disjoint_pieces_of_the_packed_corpus(
    count: int, words: int, length: int, windows: int, seed: int, bos: bool
) -> None:
    documents, tokenizer = make_documents(count, words), make_tokenizer(bos)
    stream, width = packed(documents), length - bos
    if len(stream) // width < windows:
        with pytest.raises(RankwiseError, match=f"it has {len(stream)} tokens, enough for {len(stream) // width} "):
            sample_windows(documents, tokenizer, windows, length, seed)
        return
    tokens = sample_windows(documents, tokenizer, windows, length, seed)
    assert tokens.shape == (windows, length)
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, sample_windows(documents, tokenizer, windows, length, seed))
    if bos:
        assert bool((tokens[:, 0] == BOS).all())
    pieces = {tuple(stream[start : start + width]): start for start in range(0, len(stream) - width + 1, width)}
    bodies = [tuple(row[int(bos) :]) for row in tokens.tolist()]
    assert all(body in pieces for body in bodies)


def test_no_text_is_drawn_twice_and_other_seeds_draw_otherwise() -> None:
    documents = make_documents(10, 20)
    drawn = [sample_windows(documents, make_tokenizer(), 20, 9, seed) for seed in range(3)]
    words = [encode(f" {word}")[-1] for word in WORDS]
    for tokens in drawn:
        flat = tokens[:, 1:].flatten().tolist()
        rows = {tuple(row) for row in tokens.tolist()}
        assert len(rows) == 20
        assert set(flat) <= set(packed(documents))
    assert len(words) == 200
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_drawn_windows_come_from_the_whole_corpus() -> None:
    """A long first document must not fill all the windows."""
    documents = [" ".join(WORDS[:100]), *make_documents(1, 1), " ".join(WORDS[100:])]
    half = len(packed(documents[:1]))
    late = set(packed(documents)[half:]) - set(packed(documents)[:half])
    tokens = sample_windows(documents, make_tokenizer(), 8, 9, seed=0)
    assert 0 < sum(bool(set(row) & late) for row in tokens.tolist()) < 8


def test_bos_can_be_left_out_and_empty_documents_do_not_count() -> None:
    documents = make_documents(4, 10)
    tokens = sample_windows(documents, make_tokenizer(), 2, 6, seed=0, add_bos=False)
    assert BOS not in tokens.flatten().tolist()
    assert torch.equal(sample_windows(["", *documents, " "], make_tokenizer(), 2, 6, 0, add_bos=False), tokens)


def test_bos_is_added_only_where_the_tokenizer_does() -> None:
    assert default_bos(make_tokenizer(True)) == BOS
    assert default_bos(make_tokenizer(False)) is None
    ended = build_tokenizer(False)
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    ended.backend_tokenizer.post_processor = end
    assert ended("").input_ids == [EOS]
    assert default_bos(ended) is None


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 6),
    words=st.integers(1, 20),
    length=st.integers(1, 12),
    stride=st.integers(1, 12),
    windows=st.none() | st.integers(1, 5),
    bos=st.booleans(),
    each=st.booleans(),
)
def test_consecutive_windows_start_every_stride(
    count: int, words: int, length: int, stride: int, windows: int | None, bos: bool, each: bool
) -> None:
    documents = make_documents(count, words)
    length += each
    stride = min(stride, length)
    text = encode("\n\n".join(documents))
    if bos and each:
        begins = range(0, len(text) - length + 2, min(stride, length - 1))
        reference = [[BOS, *text[start : start + length - 1]] for start in begins]
    else:
        stream = [BOS, *text] if bos else text
        reference = [stream[start : start + length] for start in range(0, len(stream) - length + 1, stride)]
    if len(reference) < (windows or 1):
        with pytest.raises(RankwiseError, match=r"the text is too short: .* asked for\. Lower `windows`"):
            consecutive_windows(documents, make_tokenizer(), length, stride, windows, bos, each)
    else:
        tokens = consecutive_windows(documents, make_tokenizer(), length, stride, windows, bos, each)
        assert tokens.dtype == torch.int32
        assert tokens.tolist() == reference[:windows]


def test_pieces_change_nothing_but_tokens_at_their_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_documents(12, 10)
    whole = consecutive_windows(documents, make_tokenizer(), 7)
    monkeypatch.setattr(corpora, "PIECE", 40)
    assert list(corpora._pieces(documents)) != ["\n\n".join(documents)]
    assert "".join(corpora._pieces(documents)) == "\n\n".join(documents)
    assert torch.equal(consecutive_windows(documents, make_tokenizer(), 7), whole)  # no token here spans a seam


def test_a_long_document_is_tokenised_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = make_documents(1, 300)
    windows = {
        kind: cut([text], make_tokenizer(), *arguments)
        for kind, cut, arguments in (("all", consecutive_windows, (7,)), ("drawn", sample_windows, (5, 7, 0)))
    }
    monkeypatch.setattr(corpora, "PIECE", 40)
    assert max(map(len, corpora._cut(text))) <= 40
    assert "".join(corpora._cut(text)) == text
    assert "".join(corpora._cut("x" * 100)) == "x" * 100
    assert torch.equal(consecutive_windows([text], make_tokenizer(), 7), windows["all"])  # no token spans a seam
    assert torch.equal(sample_windows([text], make_tokenizer(), 5, 7, 0), windows["drawn"])
    asked: list[str] = []
    monkeypatch.setattr(corpora, "_encode", lambda tokenizer, piece: asked.append(piece) or list(range(9)))
    consecutive_windows([text], make_tokenizer(), 5, windows=1)
    assert [len(piece) <= 2 * 40 for piece in asked] == [True]


def test_only_the_needed_text_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 40)
    asked: list[str] = []
    encode_piece = corpora._encode

    def record(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        asked.append(text)
        return encode_piece(tokenizer, text)

    monkeypatch.setattr(corpora, "_encode", record)
    consecutive_windows(make_documents(12, 10), make_tokenizer(), 5, windows=2)
    assert len(asked) == 1


def test_long_texts_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    documents, tokenizer = make_documents(1, 150), build_tokenizer(bos=True)  # a new one: it warns only once
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        sample_windows(documents, tokenizer, 2, 20, 0)
        consecutive_windows(documents, tokenizer, 20)
        assert "longer than the specified maximum" not in caplog.text
        tokenizer(documents[0])
        assert "longer than the specified maximum" in caplog.text  # that the test could have seen it
    finally:
        logger.removeHandler(caplog.handler)


def test_given_windows_are_used_as_they_are() -> None:
    given_windows = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    tokenizer = make_tokenizer()
    beyond = given_windows + len(tokenizer) - 11  # by one
    assert torch.equal(consecutive_windows(beyond - 1, tokenizer, 4), beyond - 1)
    assert torch.equal(sample_windows(given_windows, tokenizer, 2, 4, seed=5), given_windows[:2])
    assert torch.equal(consecutive_windows(given_windows, tokenizer, 4), given_windows)
    cases: list[tuple[Callable[[], torch.Tensor], str]] = [
        (lambda: sample_windows(given_windows, tokenizer, 2, 5, 0), "have 4 tokens, and `length` is 5"),
        (lambda: sample_windows(given_windows, tokenizer, 4, 4, 0), "4 windows are asked for.* has 3"),
        (lambda: consecutive_windows(given_windows, tokenizer, 4, stride=2), "`stride: 2` needs a text"),
        (lambda: consecutive_windows(given_windows + 5000, tokenizer, 4), "token id 5011.*another tokenizer"),
        (lambda: consecutive_windows(beyond, tokenizer, 4), f"token id {len(tokenizer)}, but .* {len(tokenizer)} "),
    ]
    for call, expected in cases:
        with pytest.raises(RankwiseError, match=expected):
            call()


def test_the_hash_is_that_of_little_endian_rows() -> None:
    tokens = torch.tensor([[1, 2], [258, 4]])
    data = bytes([1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 0, 0, 4, 0, 0, 0])
    assert token_hash(tokens) == hashlib.sha256(data).hexdigest() == token_hash(tokens.to(torch.int32))


def make_corpus(folder: Path, **section: Any) -> Path:
    corpus = Corpus.model_validate(section)
    suffix = "safetensors" if corpus.format == "tokens" else "jsonl"
    fetch_corpus("c", corpus, folder / "cache", folder / "c.json", folder / "data" / f"c.{suffix}")
    return folder / "c.json"


def test_documents_are_read_back_as_they_were_fetched(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("one\u2028still one\n\nthree", encoding="utf-8")
    index = make_corpus(tmp_path, source={"path": str(tmp_path / "t")}, format="lines")
    assert load_documents(index) == ["one\u2028still one", "", "three"]
    with (tmp_path / "data" / "c.jsonl").open("a") as stream:
        stream.write('{"text": "four"}\n')
    with pytest.raises(RankwiseError, match=r"c\.jsonl: not the file that .*c\.json describes"):
        load_documents(index)
    (tmp_path / "data" / "c.jsonl").unlink()
    with pytest.raises(RankwiseError, match=r"c\.jsonl: missing"):
        load_documents(index)


def test_calibration_writes_tokens_with_their_record(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "t").write_text("\n".join(make_documents(5, 20)))
    index = make_corpus(tmp_path, source={"path": str(tmp_path / "t")}, format="lines")
    preset = Calibration(corpora=["c"], windows=4, length=8, seed=3)
    sample_calibration("tiny", preset, tmp_path / "model", [index], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        tokens, record = file.get_tensor("tokens"), json.loads(file.metadata()["record"])
    assert torch.equal(tokens, sample_windows(make_documents(5, 20), make_tokenizer(), 4, 8, 3))
    assert record.pop("crc32")
    assert record == {
        "model": "tiny",
        "corpora": "c",
        "corpora_sha256": json.loads(index.read_text())["sha256"],
        "seed": "3",
        "sha256": token_hash(tokens),
    }
    too_many = preset.model_copy(update={"windows": 400})
    with pytest.raises(RankwiseError, match="calibration with the corpus 'c': the text is too short"):
        sample_calibration("tiny", too_many, tmp_path / "model", [index], tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_calibration_windows_of_several_corpora_take_turns(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 64}')
    indices = []
    for name, first in [("a", 0), ("b", 12)]:
        folder = tmp_path / name
        folder.mkdir()
        np.savez(folder / "t.npz", tokens=first + np.arange(12).reshape(3, 4))
        indices.append(make_corpus(folder, source={"tokens": str(folder / "t.npz")}, format="tokens"))
    preset = Calibration(corpora=["a", "b"], windows=5, length=4)
    sample_calibration("tiny", preset, tmp_path / "model", indices, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.get_tensor("tokens")[:, 0].tolist() == [0, 12, 4, 16, 8]
    too_many = preset.model_copy(update={"windows": 8})
    with pytest.raises(RankwiseError, match="calibration with the corpus 'a': 4 windows are asked for"):
        sample_calibration("tiny", too_many, tmp_path / "model", indices, tmp_path / "none.safetensors")


def test_calibration_windows_fit_the_model(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 64}')
    preset = Calibration(corpora=["c"], windows=1, length=65)
    with pytest.raises(RankwiseError, match="of 65 tokens, but the model 'tiny' reads at most 64"):
        sample_calibration("tiny", preset, tmp_path / "model", [tmp_path / "c.json"], tmp_path / "out.safetensors")


def test_the_first_windows_are_as_many_as_asked_for_or_an_error() -> None:
    tokens = torch.arange(12).view(4, 3)
    assert torch.equal(first_windows(tokens, 3, "sequences"), tokens[:3])
    assert torch.equal(first_windows(tokens, None, "sequences"), tokens)
    with pytest.raises(RankwiseError, match="`sequences: 5`: the calibration has 4 windows; calibrate on more, or"):
        first_windows(tokens, 5, "sequences")


def test_calibration_on_given_tokens(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"max_position_embeddings": 64}')
    np.savez(tmp_path / "t.npz", tokens=np.arange(12).reshape(3, 4))
    index = make_corpus(tmp_path, source={"tokens": str(tmp_path / "t.npz")}, format="tokens")
    preset = Calibration(corpora=["c"], windows=3, length=4)
    sample_calibration("tiny", preset, tmp_path / "model", [index], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.get_tensor("tokens").tolist() == np.arange(12).reshape(3, 4).tolist()
