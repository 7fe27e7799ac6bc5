"""GGUF files (llama.cpp's format), turned once into a safetensors checkpoint by transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import RankwiseError
from lowrank.sources.disk import require_free

log = logging.getLogger(__name__)

ELSEWHERE = "Take the safetensors version of the model if there is one."
PARTS, SCALING, ROTATION = "split.count", ".rope.scaling.type", "rope_freqs.weight"
WINDOW = ".attention.sliding_window"
"""Of llama.cpp's format: the number of files of a model, how a rotation of positions is scaled, and how far back a
token sees, 0 for all the way."""


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and the tokenizer of a GGUF file as a checkpoint; quantised weights become `dtype`.

    Args:
        file: the GGUF file.
        folder: an existing folder, empty.
        dtype: of the weights in the checkpoint.

    Raises:
        RankwiseError: the file is truncated, no GGUF or one of several parts, its architecture cannot be read, it holds
            what transformers leaves out, or the disk is too small.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    parameters, window = _inspected(file)
    place = str(file.absolute())  # a bare name would be looked for in the working directory first
    require_free(folder, parameters * dtype.itemsize, f"converting {file.name}")
    log.info("converting %s (%.1f M weights) to safetensors", file.name, parameters / 1e6)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,  # which is empty: an adapter, or another tokenizer, beside the file would be loaded too
            gguf_file=place,
            dtype=dtype,
            output_loading_info=True,
            # Without it transformers 5 takes the dequantised model for a quantised one and refuses to save it.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=place)
    except Exception as error:  # KeyError, ValueError, RuntimeError, ... for what transformers cannot read
        raise RankwiseError(
            f"{file}: transformers cannot convert this GGUF file ({type(error).__name__}: {error}). {ELSEWHERE}"
        ) from error
    if found["missing_keys"] or model.num_parameters() != parameters:
        missing = f"; {min(found['missing_keys'])} is not in it" if found["missing_keys"] else ""
        raise RankwiseError(
            f"{file}: it has {parameters:,} weights, and the {type(model).__name__} that transformers makes of it "
            f"{model.num_parameters():,}{missing}. Not all of the file is read. {ELSEWHERE}"
        )
    _require_window(file, window, model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _inspected(file: Path) -> tuple[int, int]:
    """The number of weights and the sliding window; reading all the tables shows a truncated file before converting.

    Raises:
        RankwiseError: the file is damaged, a part of several, or its rotation of positions is one that is not read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        parts = reader.fields[PARTS].contents() if PARTS in reader.fields else 1
        scaling = {name: field.contents() for name, field in reader.fields.items() if name.endswith(SCALING)}
        windows = [field.contents() for name, field in reader.fields.items() if name.endswith(WINDOW)]
    except Exception as error:  # the reader has no error type of its own: ValueError, IndexError, OSError, ...
        raise RankwiseError(
            f"{file}: truncated, or no GGUF file ({error}). Fetch it again and compare its size and checksum."
        ) from error
    if parts > 1:
        raise RankwiseError(
            f"{file}: one of {parts} parts. Put them together (llama-gguf-split --merge), or: {ELSEWHERE}"
        )
    if ROTATION in sizes or set(scaling.values()) - {"none"}:
        kind = ROTATION if ROTATION in sizes else next(iter(scaling))
        raise RankwiseError(f"{file}: its rotation of positions is scaled ({kind}), which is not read. {ELSEWHERE}")
    return sum(sizes.values()), max(windows, default=0)


def _require_window(file: Path, window: int, config: Any) -> None:
    """See that a sliding window has arrived; transformers reads it of some architectures only, of Phi-3's not.

    Args:
        file: the GGUF file.
        window: as it says; 0 for none.
        config: what transformers made of it.

    Raises:
        RankwiseError: the model would see further back.
    """
    found = getattr(config, "sliding_window", None)
    if 0 < window < config.max_position_embeddings and found != window:
        raise RankwiseError(
            f"{file}: its tokens see {window} tokens back ({WINDOW.removeprefix('.')}), which is not read. {ELSEWHERE}"
        )
