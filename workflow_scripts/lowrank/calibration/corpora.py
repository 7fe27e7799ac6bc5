"""Reading corpora, and cutting them into windows of token ids."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank.config.presets import Calibration
from lowrank.errors import RankwiseError
from lowrank.files import described_file, load_tensors, read_record, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SEPARATOR = "\n\n"
PIECE = 4_000_000  # characters tokenised at once: about half a GB while it lasts

Texts = list[str] | torch.Tensor
"""The content of a corpus: its documents, or its given windows of token ids, int32, n x length."""


def read_index(index: str | Path) -> dict[str, Any]:
    """The index of a corpus.

    Raises:
        RankwiseError: missing or damaged.
    """
    return read_record(index)


def load_documents(index: str | Path) -> Texts:
    """The content of a corpus, by its index; its data file is in the folder `data` beside the index.

    Returns:
        The documents, or for token corpora an int32 tensor, n x length.

    Raises:
        RankwiseError: a file is missing, damaged, or not the one that the index describes.
    """
    data = described_file(index)
    if read_index(index)["kind"] == "tokens":
        return load_tensors(data)["tokens"]
    with data.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts before every text by default, if it does and it is the BOS token."""
    first = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    return tokenizer.bos_token_id if first and first[0] == tokenizer.bos_token_id else None


def sample_windows(
    documents: Texts, tokenizer: PreTrainedTokenizerBase, windows: int, length: int, seed: int, add_bos: bool = True
) -> torch.Tensor:
    """Draw windows of a corpus at random, without overlap: every part of the text is equally likely.

    The documents are tokenised one by one, each ended by the EOS token if there is one, and joined; this stream is
    cut into consecutive windows, and `windows` of them are drawn without replacement, in random order. Windows of
    long texts so come from many documents, and short documents are packed. Given windows of token ids are used as
    they are, in their order: two programs can be compared on the same ones.

    Args:
        documents: the corpus.
        tokenizer: of the model.
        windows: n.
        length: tokens a window, the BOS token included.
        seed: of the draw.
        add_bos: start each window with the BOS token if the tokenizer starts texts with it by default.

    Returns:
        Token ids, int32, n x length.

    Raises:
        RankwiseError: there is not so much text, or given windows are fewer or of another length.
    """
    if isinstance(documents, torch.Tensor):
        return _given(documents, tokenizer, windows, length)
    bos = default_bos(tokenizer) if add_bos else None
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = _stream(ids for text in documents if text.strip() for ids in chain(_pieces_of(text, tokenizer), [eos]))
    width = length - (bos is not None)
    available = len(stream) // width
    if available < windows:
        raise RankwiseError(_too_short(len(stream), available, windows, length))
    chosen = random.Random(seed).sample(range(available), windows)
    cut = stream[: available * width].view(available, width)[chosen]
    return cut if bos is None else torch.cat([torch.full((windows, 1), bos, dtype=torch.int32), cut], dim=1)


def consecutive_windows(
    documents: Texts,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    stride: int | None = None,
    windows: int | None = None,
    add_bos: bool = True,
    bos_each: bool = False,
) -> torch.Tensor:
    """Cut a corpus into windows from its start, as published perplexities do; a rest shorter than a window is dropped.

    The documents are joined by an empty line and tokenised together; the BOS token stands once, at the very start.
    With `bos_each` each window is the BOS token and `length - 1` tokens of the text.
    Texts of more than four million characters are tokenised in pieces of whole documents, and longer documents in
    pieces that end before a space, which can change a token at the seams. Given windows of token ids are used as they
    are.

    Args:
        documents: the corpus.
        tokenizer: of the model.
        length: tokens a window.
        stride: distance of the windows' starts; None: `length`, no overlap.
        windows: the first so many; None: all.
        add_bos: put the BOS token first if the tokenizer does so by default.
        bos_each: put it, if at all, before each window.

    Returns:
        Token ids, int32, n x length; window i starts at token i x stride of the text (with `bos_each` at most i x
        (length - 1), so that no token is left out).

    Raises:
        RankwiseError: there is not so much text, or given windows are fewer or of another length, or overlap is asked
            of them.
    """
    step = stride or length
    if isinstance(documents, torch.Tensor):
        if step != length:
            raise RankwiseError(
                f"`stride: {step}` needs a text; the windows of a `tokens:` corpus are used as they are."
            )
        return _given(documents, tokenizer, windows, length)
    bos = default_bos(tokenizer) if add_bos else None
    bos_each = bos_each and bos is not None
    taken = length - 1 if bos_each else length
    step = min(step, taken)
    needed = None if windows is None else (windows - 1) * step + taken
    pieces = (_encode(tokenizer, piece) for piece in _pieces(documents))
    stream = _stream(chain([] if bos is None or bos_each else [[bos]], pieces), needed)
    available = max(0, (len(stream) - taken) // step + 1)
    if available < (windows or 1):
        raise RankwiseError(_too_short(len(stream), available, windows or 1, length))
    cut = stream.unfold(0, taken, step)[:windows]
    return torch.nn.functional.pad(cut, (1, 0), value=bos) if bos_each and bos is not None else cut.contiguous()


def token_hash(tokens: torch.Tensor) -> str:
    """Hex SHA-256 of token ids as little-endian int32, row by row; the same windows have the same hash anywhere."""
    return hashlib.sha256(tokens.to(torch.int32).contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def sample_calibration(
    name: str, calibration: Calibration, checkpoint: str | Path, indices: Sequence[str | Path], target: str | Path
) -> None:
    """Draw the windows of a calibration preset with a model's tokenizer, and write them.

    Args:
        name: the model's name, for the record.
        calibration: the preset.
        checkpoint: the model's folder, with its tokenizer.
        indices: of the preset's corpora.
        target: the safetensors file to write, one tensor `tokens`, int32, n x length; of several corpora, windows
            take turns, so that the first few are of all corpora too.

    Raises:
        RankwiseError: see `load_documents` and `sample_windows`.
    """
    from lowrank.model.tokenizer import load_tokenizer

    positions = read_record(Path(checkpoint) / "config.json").get("max_position_embeddings")
    if positions is not None and calibration.length > positions:
        raise RankwiseError(
            f"calibration windows of {calibration.length} tokens, but the model '{name}' reads at most {positions}; "
            "lower `length` in the config's `calibration`"
        )
    tokenizer = load_tokenizer(checkpoint)
    corpora = calibration.corpora
    tokens = torch.empty(calibration.windows, calibration.length, dtype=torch.int32)
    for turn, (corpus, index) in enumerate(zip(corpora, indices, strict=True)):
        of_this = tokens[turn :: len(corpora)]
        if not len(of_this):
            continue
        try:
            of_this[:] = sample_windows(
                load_documents(index), tokenizer, len(of_this), calibration.length, calibration.seed
            )
        except RankwiseError as error:
            raise RankwiseError(f"calibration with the corpus '{corpus}': {error}") from error
    record = {
        "model": name,
        "corpora": ", ".join(corpora),
        "corpora_sha256": ", ".join(str(read_index(index)["sha256"]) for index in indices),
        "seed": str(calibration.seed),
        "sha256": token_hash(tokens),
    }
    save_tensors(target, {"tokens": tokens}, metadata=record)
    log.info("%d windows of %d tokens from %s", *tokens.shape, ", ".join(corpora))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning that the text is longer than the model's context; it is cut into windows here
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _pieces_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    return (_encode(tokenizer, piece) for piece in _cut(text))


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """The documents, joined by the separator, in pieces of whole documents; the pieces together are the whole text."""
    part: list[str] = []
    size = 0
    for number, text in enumerate(documents):
        for piece in _cut(text if number == 0 else SEPARATOR + text):
            part.append(piece)
            size += len(piece)
            if size >= PIECE:
                yield "".join(part)
                part, size = [], 0
    if part:
        yield "".join(part)


def _cut(text: str) -> Iterator[str]:
    """A document in pieces that are tokenised at once, cut before a space; one that is short stays whole."""
    begin = 0
    while len(text) - begin > PIECE:
        space = text.rfind(" ", begin + 1, begin + PIECE)
        end = space if space > 0 else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _stream(parts: Iterable[list[int]], needed: int | None = None) -> torch.Tensor:
    """All ids in one int32 tensor; with `needed`, no part is read once there are so many."""
    tensors: list[torch.Tensor] = [torch.empty(0, dtype=torch.int32)]
    total = 0
    for ids in parts:
        tensors.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
        if needed is not None and total >= needed:
            break
    return torch.cat(tensors)


def _given(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, windows: int | None, length: int) -> torch.Tensor:
    """The first windows of a token corpus, checked."""
    if tokens.shape[1] != length:
        raise RankwiseError(
            f"the given windows have {tokens.shape[1]} tokens, and `length` is {length}. Windows of a `tokens:` corpus "
            "are used as they are: set `length` to theirs."
        )
    if windows is not None and len(tokens) < windows:
        raise RankwiseError(f"{windows} windows are asked for, and the `tokens:` corpus has {len(tokens)}.")
    if int(tokens.max()) >= len(tokenizer):
        raise RankwiseError(
            f"token id {int(tokens.max())}, but the tokenizer has {len(tokenizer)} tokens: the file was made with "
            "another tokenizer."
        )
    return tokens[:windows].to(torch.int32)


def _too_short(tokens: int, available: int, windows: int, length: int) -> str:
    return (
        f"the text is too short: it has {tokens} tokens, enough for {available} windows of {length}, and {windows} are "
        "asked for. Lower `windows` or `length`, or take more `documents`."
    )


def first_windows(tokens: torch.Tensor, count: int | None, key: str) -> torch.Tensor:
    """The first calibration windows.

    Args:
        tokens: windows x length token ids.
        count: how many, or None for all.
        key: the setting that says so, for errors.

    Raises:
        RankwiseError: there are fewer.
    """
    if count is not None and count > len(tokens):
        raise RankwiseError(
            f"`{key}: {count}`: the calibration has {len(tokens)} windows; calibrate on more, or take fewer"
        )
    return tokens[:count]
