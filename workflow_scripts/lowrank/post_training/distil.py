"""The whole distillation of a compressed checkpoint: block by block, from the first to the last.

Two streams of hidden states go through the blocks, that of the dense model and that of the compressed model as far as
it is trained. Blocks that were finished before a job was stopped are not trained again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.compression.given_up import write_manifest
from lowrank.config.tuning import FeatureDistillation
from lowrank.errors import RankwiseError
from lowrank.files import Record, load_tensors, read_record
from lowrank.jobs.state import Parts, resumable_state
from lowrank.model.card import model_card
from lowrank.model.checkpoint import family_of, load_checkpoint, save_checkpoint
from lowrank.model.devices import pick_devices, spread, weights_of
from lowrank.model.partial_forward import block_input, output_of
from lowrank.model.runtime import describe_environment, parse_dtype
from lowrank.post_training.distillation import Distilled, Features, distil_block, factor_weights

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096
"""Of a forward pass without gradients."""
CURVES = ("loss", "validation")


def distil_checkpoint(
    checkpoint: str | Path,
    manifest: str | Path,
    model: str | Path,
    model_manifest: str | Path,
    tokens: str | Path,
    target: str | Path,
    target_manifest: str | Path,
    settings: dict[str, Any],
) -> None:
    """Distil a compressed checkpoint and write it with its manifest.

    Args:
        checkpoint: folder of the compressed model.
        manifest: its manifest.json.
        model: folder of the dense model.
        model_manifest: its manifest.
        tokens: file of the calibration windows.
        target: folder of the tuned checkpoint.
        target_manifest: its manifest.json.
        settings: "tuning", "subject" (with "seed"), "dtype", "state", "code".

    Raises:
        RankwiseError: nothing to train, too few windows, or a loss that is not finite.
    """
    tuning = FeatureDistillation.model_validate(settings["tuning"])
    key = {name: value for name, value in settings.items() if name != "state"}
    inputs = {"manifest": manifest, "model_manifest": model_manifest, "tokens": tokens}
    with resumable_state(settings["state"], "distil_features", key, inputs) as folder:
        parts = Parts(folder)
        dense, compressed = _opened(model, checkpoint, parse_dtype(settings["dtype"]))
        windows = load_tensors(tokens, ("tokens",))["tokens"].long()
        blocks = distil_model(compressed, dense, windows, tuning, settings["subject"]["seed"], parts)
        parameters = sum(parameter.numel() for parameter in compressed.parameters())
        new = {
            "subject": settings["subject"],
            "tuning": settings["tuning"],
            "training": describe_distillation(blocks, parameters, parts.clock.seconds),
        }
        described = Record(read_record(manifest) | new, Path(manifest))
        files = save_checkpoint(compressed, checkpoint, target, lambda folder: model_card(described, folder))
        write_manifest(
            target_manifest,
            described | {"files": files, "seconds": parts.clock.seconds, "environment": describe_environment()},
        )


def _opened(model: str | Path, checkpoint: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The dense model and the compressed one on the devices of this job, over which both are spread alike."""
    dense, compressed = load_checkpoint(model, dtype), load_checkpoint(checkpoint, dtype)
    path, devices = family_of(dense).blocks, pick_devices()
    for one, other in ((dense, compressed), (compressed, dense)):
        blocks, around = weights_of(other, path)
        spread(one, path, devices, sum(blocks) / len(blocks), around)
    return dense, compressed


def distil_model(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: torch.Tensor,
    tuning: FeatureDistillation,
    seed: int,
    parts: Parts,
) -> dict[int, Distilled]:
    """Train the factors of all blocks that have some, in place, one block after the other.

    Args:
        model: the compressed model.
        dense: the model that it was made from.
        windows: token ids, windows x length, on the CPU.
        tuning: the preset.
        seed: of the order of windows.
        parts: where finished blocks are kept, and found again; they must be of the same call.

    Returns:
        Index of a block -> what its training came to.

    Raises:
        RankwiseError: the model has no low-rank pair, or see `distil_block`.
    """
    layers = range(len(list(model.get_submodule(family_of(model).blocks).children())))
    trained = [layer for layer in layers if factor_weights(model, layer)]
    if not trained:
        raise RankwiseError("this checkpoint has no low-rank pair, so there is nothing to distil; take `tuning: none`")
    started, found = time.monotonic(), dict[int, Distilled]()
    entering = _entering(dense, windows)
    states = {"dense": entering, "compressed": entering.clone()}
    del entering  # or it would live as long as the last block's
    for layer in range(trained[-1] + 1):
        leaving = torch.empty_like(states["dense"])
        _pass(dense, layer, windows, states["dense"], leaving)
        if layer in trained:
            features = Features(windows, tuple(states[name] for name in tuning.inputs), leaving)
            found[layer] = _resumed(model, parts, layer) or _distilled(model, parts, layer, features, tuning, seed)
            spent = time.monotonic() - started
            _report(layer, found[layer], len(layers), spent * (len(trained) - len(found)) / len(found))
        if layer < trained[-1]:
            _pass(model, layer, windows, states["compressed"], states["compressed"])
            states["dense"] = leaving
    return found


def describe_distillation(blocks: dict[int, Distilled], parameters: int, seconds: float) -> dict[str, Any]:
    """The `training` part of a distilled checkpoint's manifest.

    Args:
        blocks: what the training of each block came to; losses are `feature_loss`, added up over its inputs.
        parameters: of the model.
        seconds: that all took.
    """
    trainable = sum(weight.numel() for block in blocks.values() for weight in block.weights.values())
    return {
        "steps": sum(len(block.loss) for block in blocks.values()),
        "trainable": trainable,
        "trainable_share": trainable / parameters,
        "blocks": {
            str(layer): {"best_step": block.best, **{curve: getattr(block, curve) for curve in CURVES}}
            for layer, block in blocks.items()
        },
        "processes": 1,
        "seconds": seconds,
    }


def _distilled(
    model: PreTrainedModel, parts: Parts, layer: int, features: Features, tuning: FeatureDistillation, seed: int
) -> Distilled:
    """Train a block, and keep the result."""
    block = distil_block(model, layer, features, tuning, seed)
    curves = {curve: torch.tensor(getattr(block, curve), dtype=torch.float64) for curve in CURVES}
    parts.save(_part(layer), block.weights | curves | {"best": torch.tensor(block.best)})
    return block


def _resumed(model: PreTrainedModel, parts: Parts, layer: int) -> Distilled | None:
    """A block that an earlier try has finished, put into the model; None if none has."""
    kept = parts.load(_part(layer))
    if kept is None:
        return None
    weights = {name: kept[name] for name in factor_weights(model, layer)}
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    curves = {curve: [(int(step), loss) for step, loss in kept[curve].tolist()] for curve in CURVES}
    return Distilled(weights, **curves, best=int(kept["best"]))


def _part(layer: int) -> str:
    return f"block_{layer}"


def _report(layer: int, block: Distilled, layers: int, left: float) -> None:
    validation = dict(block.validation)
    log.info(
        "block %d of %d: loss of held-out windows %.4f, before %.4f; best after %d of %d steps; %.0f s left",
        *(layer + 1, layers, validation[block.best], validation[0], block.best, len(block.loss), left),
    )


@torch.no_grad()
def _entering(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """What enters the first block, windows x length x d, on the CPU."""
    return torch.cat([block_input(model, ids.to(model.device)).cpu() for ids in _batches(windows)])


@torch.no_grad()
def _pass(
    model: PreTrainedModel, layer: int, windows: torch.Tensor, entering: torch.Tensor, leaving: torch.Tensor
) -> None:
    """Fill in what leaves a block, on the CPU; it may take the place of what enters."""
    device = model.device
    for ids, read, written in zip(*map(_batches, (windows, entering, leaving)), strict=True):
        written.copy_(output_of(model, ids.to(device), layer, read.to(device)))


def _batches(windows: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1]))
