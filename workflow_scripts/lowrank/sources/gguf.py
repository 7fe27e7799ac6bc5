"""GGUF files (llama.cpp's format), turned once into a safetensors checkpoint by transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lowrank.errors import RankwiseError
from lowrank.sources.disk import require_free

log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and the tokenizer of a GGUF file as a checkpoint; quantised weights become `dtype`.

    Args:
        file: the GGUF file.
        folder: an existing folder.
        dtype: of the weights in the checkpoint.

    Raises:
        RankwiseError: the file is truncated or no GGUF, its architecture cannot be read, or the disk is too small.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    parameters = _count_parameters(file)
    require_free(folder, parameters * dtype.itemsize, f"converting {file.name}")
    log.info("converting %s (%.1f M weights) to safetensors", file.name, parameters / 1e6)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            # Without it transformers 5 takes the dequantised model for a quantised one and refuses to save it.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # KeyError, ValueError, RuntimeError, ... for what transformers cannot read
        raise RankwiseError(
            f"{file}: transformers cannot convert this GGUF file ({type(error).__name__}: {error}). Take the "
            "safetensors version of the model if there is one."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _count_parameters(file: Path) -> int:
    """The number of weights; reading all the tables shows a truncated file before anything is converted."""
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # the reader has no error type of its own: ValueError, IndexError, OSError, ...
        raise RankwiseError(
            f"{file}: truncated, or no GGUF file ({error}). Fetch it again and compare its size and checksum."
        ) from error
