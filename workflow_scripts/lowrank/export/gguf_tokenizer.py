"""The tokenizer of a GGUF file: the tokens of a `tokenizer.json`, and the name of how llama.cpp is to split text.

llama.cpp splits text by code of its own and goes by a name. A way of splitting that is not in `PRE_TOKENIZERS` is an
error here, for a wrong name gives wrong tokens without a word.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from lowrank.errors import RankwiseError
from lowrank.files import read_record

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _SPACES, "plain bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _SPACES, "plain bytes"): "qwen2",
}
"""Steps of a byte-level tokenizer -> llama.cpp's name for them: `bytes` splits as GPT-2 does, `plain bytes` does not,
`digits` puts each digit alone, and patterns are patterns (llama.cpp, `src/llama-vocab.cpp`)."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int) -> None:
    """Add the tokens of a folder's tokenizer, their merges, the special ones, and the chat template.

    Args:
        writer: of the file.
        folder: with `tokenizer.json`.
        vocabulary: rows of the embedding; those without a token are marked as unused.

    Raises:
        RankwiseError: no such tokenizer, or one that llama.cpp's names do not cover.
    """
    if not (folder / "tokenizer.json").is_file():
        raise RankwiseError(
            f"{folder}: has no `tokenizer.json`, from which a GGUF file's tokens are taken. Open its tokenizer with "
            "transformers' `AutoTokenizer`, `save_pretrained` it into another folder, and copy its `tokenizer.json` "
            "from there into this one; or write `TO=dense`, and use llama.cpp's own converter."
        )
    tokenizer = read_record(folder / "tokenizer.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise RankwiseError(
            f"{folder / 'tokenizer.json'}: a {model.get('type')} tokenizer; llama.cpp is given BPE here"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    texts, types = _tokens(tokenizer, vocabulary)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(folder, model, vocabulary))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(folder, tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=vocabulary)
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: dict[str, Any], vocabulary: int) -> tuple[list[bytes], list[int]]:
    """The text and the type of each token."""
    model = tokenizer["model"]
    texts = [f"[PAD{index}]".encode() for index in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    for text, index in model["vocab"].items():
        if index >= vocabulary:  # without an embedding, see `sources.checks`
            continue
        texts[index], types[index] = text.encode(), int(TokenType.NORMAL)
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = int(TokenType.BYTE)
    for added in tokenizer.get("added_tokens", []):
        if added["id"] >= vocabulary:
            continue
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        texts[added["id"]], types[added["id"]] = added["content"].encode(), int(kind)
    if (unknown := model["vocab"].get(model.get("unk_token"), vocabulary)) < vocabulary:
        types[unknown] = int(TokenType.UNKNOWN)
    return texts, types


def _scores(folder: Path, model: dict[str, Any], vocabulary: int) -> list[float]:
    """Scores of a SentencePiece vocabulary, of which only the order matters: pieces stand in the order of merging.

    Raises:
        RankwiseError: they do not.
    """
    merged = [model["vocab"]["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    if any(later < earlier for earlier, later in pairwise(merged)):
        raise RankwiseError(
            f"{folder / 'tokenizer.json'}: its pieces do not stand in the order in which they are merged, so that "
            "their scores are not known. Write `TO=dense`, and use llama.cpp's own converter with `tokenizer.model`."
        )
    return [-float(index) for index in range(vocabulary)]


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether text begins with a space that is not there."""
    steps = [
        *_flat(tokenizer.get("normalizer"), "normalizers"),
        *_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in steps)


def _pre_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text.

    Raises:
        RankwiseError: none is known.
    """
    steps: list[str] = []
    for step in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif step["type"] == "Split":
            steps.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append("bytes" if step.get("use_regex", True) else "plain bytes")
        else:
            steps.append(str(step["type"]))
    if tuple(steps) not in PRE_TOKENIZERS:
        raise RankwiseError(
            f"{folder / 'tokenizer.json'}: how it splits text ({', '.join(steps) or 'not at all'}) has no name here "
            "that llama.cpp knows. Write `TO=dense`, and use llama.cpp's own converter."
        )
    return PRE_TOKENIZERS[tuple(steps)]


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]
