"""A model with random weights: the architecture of a family at a given shape, for studies of the workflow itself."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from lowrank.config.sources import Model, ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES
from lowrank.model.runtime import parse_dtype
from lowrank.model.shapes import INTERMEDIATE

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.jinja")


def make_random_checkpoint(model: Model, seed: int, tokenizer: Path | None, folder: Path) -> None:
    """Save a randomly initialised model of the config's shape, with another model's tokenizer.

    Args:
        model: its section of the config.
        seed: of the weights; the same seed gives the same bytes on one machine.
        tokenizer: checkpoint folder whose tokenizer is copied.
        folder: where to save; it exists.

    Raises:
        RankwiseError: no tokenizer is there to be copied.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = sorted({file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)}) if tokenizer else []
    if not files:
        raise RankwiseError(f"{tokenizer}: holds no tokenizer to be lent to a random model.")
    shape = model.shape
    config = AutoConfig.for_model(shape.family, **_numbers(shape, model.max_length), **_tokens(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    random_model.to(parse_dtype(model.dtype)).save_pretrained(folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    log.info("random weights of seed %d, tokenizer of %s", seed, tokenizer)


def _numbers(shape: ModelShape, max_length: int) -> dict[str, Any]:
    """The shape in the words of a transformers configuration."""
    numbers: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": shape.tied_embeddings,
    }
    if shape.family == "opt":
        return numbers | {"ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden}
    if shape.experts:  # transformers takes either name of their number, whatever the family
        numbers |= {"num_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
        numbers |= {INTERMEDIATE.get(shape.family, "intermediate_size"): shape.intermediate}
    return numbers | {
        "intermediate_size": shape.intermediate,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        **{option: getattr(shape, option) for option in FAMILIES[shape.family].bias_options},
    }


def _tokens(tokenizer: Path | None) -> dict[str, int | None]:
    """Ids of the tokenizer's special tokens, or None, since those that a family assumes are another tokenizer's."""
    from transformers import AutoTokenizer

    lent = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    return {"bos_token_id": lent.bos_token_id, "eos_token_id": lent.eos_token_id, "pad_token_id": lent.pad_token_id}
