"""One pass over the calibration windows: the moments of the inputs of every linear layer.

For y = W x + b the covariance of the outputs is W Cov(x) W', so a block needs one covariance per distinct input
(four in a Llama block) and every method finds what it needs in the same files. The pass walks the model a few
blocks at a time and keeps the hidden states in between on disk: it never holds the accumulators of all layers,
and a killed pass goes on at the last finished group of blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.checkpoint import family_of
from lowrank.families import Family
from lowrank.files import layer_name, load_tensors, save_tensors
from lowrank.moments import MomentAccumulator, Moments

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096


class _Reached(Exception):
    """Raised by a hook to leave the model's forward pass before its first block."""


@dataclass(frozen=True)
class BlockInputs:
    """What a decoder block is called with.

    Attributes:
        hidden: b x length x d.
        arguments: the other arguments of each block (position embeddings, masks), block by block.
    """

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]


def collect_statistics(
    model: PreTrainedModel, tokens: torch.Tensor, layers_per_pass: int, state: Path, device: torch.device
) -> list[Path]:
    """Collect the moments of all input sites of all blocks.

    Args:
        model: the dense model.
        tokens: windows x length token ids.
        layers_per_pass: blocks whose accumulators are held at once.
        state: folder of unfinished work; finished layer files and hidden states live there.
        device: where the model is.

    Returns:
        One safetensors file per block, in `state`.
    """
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    batches = list(torch.split(tokens, batch))
    files = [state / layer_name(layer) for layer in range(len(blocks))]
    hidden, first = _resume(state, files, layers_per_pass)
    started = time.monotonic()
    with torch.inference_mode():
        for start in range(first, len(blocks), layers_per_pass):
            stop = min(start + layers_per_pass, len(blocks))
            accumulators = _accumulators(family, blocks, range(start, stop), device)
            outputs = []
            for index, ids in enumerate(batches):
                inputs = _block_inputs(model, family, ids.to(device))
                states = inputs.hidden if hidden is None else hidden[index].to(inputs.hidden)
                for layer in range(start, stop):
                    states = _run_block(family, blocks[layer], layer, states, inputs.arguments[layer], accumulators)
                outputs.append(states.cpu())
            _store(files, accumulators, range(start, stop))
            hidden = outputs
            save_tensors(state / hidden_file(stop), {str(index): states for index, states in enumerate(hidden)})
            (state / hidden_file(start)).unlink(missing_ok=True)
            rate = tokens.numel() * (stop - first) / len(blocks) / (time.monotonic() - started)
            log.info("statistics: blocks %d-%d of %d done, %.0f tokens/s", start, stop - 1, len(blocks), rate)
    return files


def hidden_file(layer: int) -> str:
    """Name of the file with the hidden states that enter a block."""
    return f"hidden_{layer:03d}.safetensors"


def load_moments(path: Path, sites: Iterable[str]) -> dict[str, Moments]:
    """The moments of the input sites of a block."""
    tensors = load_tensors(path)
    return {site: Moments.from_tensors(tensors, site) for site in sites}


def _resume(state: Path, files: list[Path], layers_per_pass: int) -> tuple[list[torch.Tensor] | None, int]:
    """The hidden states and the block to go on with: those of the last group whose files are all there."""
    ends = [*range(layers_per_pass, len(files), layers_per_pass), len(files)]
    for layer in reversed(ends):
        path = state / hidden_file(layer)
        if path.is_file() and all(file.is_file() for file in files[:layer]):
            log.info("statistics: blocks 0-%d were finished before", layer - 1)
            stored = load_tensors(path)
            return [stored[str(index)] for index in range(len(stored))], layer
    return None, 0


def _accumulators(
    family: Family, blocks: nn.ModuleList, layers: range, device: torch.device
) -> dict[tuple[int, str], MomentAccumulator]:
    accumulators = {}
    for layer in layers:
        for site, linear in family.sites.items():
            module: Any = blocks[layer].get_submodule(linear.path)
            accumulators[layer, site] = MomentAccumulator(module.in_features, device)
    return accumulators


def _block_inputs(model: PreTrainedModel, family: Family, ids: torch.Tensor) -> BlockInputs:
    """Embed a batch, and catch what the model would call each block with (masks may differ between blocks)."""
    blocks = model.get_submodule(family.blocks)
    caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        caught.append((hidden, {key: value for key, value in kwargs.items() if key != "hidden_states"}))
        if len(caught) == len(blocks):
            raise _Reached
        return None

    handles = [block.register_forward_pre_hook(skip, with_kwargs=True) for block in blocks]
    for block in blocks:
        block.forward = _pass_through
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks:
            del block.forward  # the class's own again
    return BlockInputs(caught[0][0], [arguments for _, arguments in caught])


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands in for a block while its arguments are caught."""
    return hidden_states


def _run_block(
    family: Family,
    block: nn.Module,
    layer: int,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    accumulators: dict[tuple[int, str], MomentAccumulator],
) -> torch.Tensor:
    """Run one block on a batch, adding the inputs of its linear layers to their accumulators."""
    handles = []
    for site, linear in family.sites.items():
        accumulator = accumulators[layer, site]
        where = f"{family.blocks}.{layer}.{linear.path}"

        def record(
            module: nn.Module, args: tuple[Any, ...], to: MomentAccumulator = accumulator, name: str = where
        ) -> None:
            to.update(args[0].unflatten(0, (hidden.shape[0], -1)) if args[0].dim() == 2 else args[0], name)

        handles.append(block.get_submodule(linear.path).register_forward_pre_hook(record))
    try:
        output = block(hidden, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _store(files: list[Path], accumulators: dict[tuple[int, str], MomentAccumulator], layers: range) -> None:
    for layer in layers:
        tensors: dict[str, torch.Tensor] = {}
        for (owner, site), accumulator in accumulators.items():
            if owner == layer:
                tensors |= accumulator.result().tensors(site)
        save_tensors(files[layer], tensors)
