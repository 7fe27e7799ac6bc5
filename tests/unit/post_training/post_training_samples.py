"""A tiny compressed model, rows for it, and a training job: shared by the tests of post-training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lowrank.config.tuning import parse_tuning
from lowrank.jobs.share import Share
from lowrank.model.checkpoint import replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import separate_projections
from lowrank.post_training import loss
from lowrank.post_training.instructions import Examples
from lowrank.post_training.job import TRAIN_FILE, VALIDATION_FILE, TrainingJob

REPOSITORY = Path(__file__).parents[3]
SUBJECT = {"model": "tiny", "method": "svd", "ratio": 20, "tuning": "eq9", "seed": 0}
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def tiny_model(compressed: bool = True) -> LlamaForCausalLM:
    """Two layers with grouped-query attention; eight of their linear layers are truncated SVDs of rank 6."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if compressed:
        truncate(model, LAYERS)
    return model


def tiny_mixture() -> MixtralForCausalLM:
    """Two layers with sixteen experts each, of which a short text leaves some without a token; some are compressed."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    separate_projections(model)
    truncate(model, [f"mlp.experts.{expert}.{path}" for expert in (0, 3, 7, 12) for path in ("up_proj", "down_proj")])
    return model


def truncate(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Replace these layers of both blocks by their truncated SVDs of rank 6, in place."""
    factors = {}
    for name in (f"model.layers.{block}.{path}" for block in range(2) for path in layers):
        u, s, v = torch.linalg.svd(model.get_submodule(name).weight.detach(), full_matrices=False)
        factors[name] = LowRankFactors(v[:6], u[:, :6] * s[:6], torch.full((len(u),), 0.01))
    replace_modules(model, factors)


def save_tiny_model(folder: Path, compressed: bool = True) -> Path:
    """The tiny model as a checkpoint."""
    return save_model(tiny_model(compressed), folder)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """A model as a checkpoint without a tokenizer."""
    (folder / "no_tokenizer").mkdir(parents=True)
    save_checkpoint(model, folder / "no_tokenizer", folder / "checkpoint")
    return folder / "checkpoint"


def write_manifest(path: Path) -> None:
    """That of the tiny model, in so far as post-training reads it."""
    sizes = {"total": 80, "total_dense": 100, "decoder_linears": 60, "decoder_linears_dense": 80}
    manifest = {
        "subject": SUBJECT | {"tuning": "none"}, "base": {"name": "tiny", "source": {}, "license": "Apache-2.0"},
        "method": {"kind": "svd"}, "ranks": {"x": 6}, "kept": {"total": 0.8, "linears": 0.75}, "parameters": sizes,
    }  # fmt: skip
    path.write_text(json.dumps(manifest), encoding="utf-8")


def some_rows(count: int, seed: int) -> Examples:
    """Rows of several lengths with a pattern to learn: tokens that count up."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (count, 1), generator=generator)
    length = torch.randint(6, 13, (count,), generator=generator)
    tokens = ((start + torch.arange(12)) % 64).int()
    return Examples(tokens, torch.randint(1, 5, (count,), generator=generator), length)


def train_by_few_tokens(arguments: dict[str, Any], share: Share) -> None:
    """What a worker does, with a head that reads three tokens at a time: by their own rows, processes would need it
    differently often."""
    from lowrank.post_training.worker import train_share  # and with it DeepSpeed

    loss.CHUNK_TOKENS = 3
    train_share(arguments, share)


def a_job(checkpoint: Path, folder: Path, deepspeed: str = "zero2", seed: int = 0, **changes: Any) -> TrainingJob:
    """A job on the tiny model whose rows lie in its folder."""
    values = {
        "kind": "scaled-subspace", "instructions": "rows", "rank": 4, "learning_rate": 0.02, "steps": 6,
        "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 1, "validation_examples": 6, "evaluate_every": 2,
        "dtype": "float32",
    } | changes  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    some_rows(20, seed=1).save(folder / TRAIN_FILE)
    some_rows(6, seed=2).save(folder / VALIDATION_FILE)
    engine = json.loads((REPOSITORY / "config" / "deepspeed" / f"{deepspeed}.json").read_text())
    return TrainingJob(str(checkpoint), str(folder), parse_tuning(values).plain(), engine, seed)
