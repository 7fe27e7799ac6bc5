"""One pass over the calibration windows: the moments of the inputs of every linear layer.

For y = W x + b the covariance of the outputs is W Cov(x) W', so a block needs one covariance per distinct input
(four in a Llama block) and every method finds what it needs in the same files. The pass walks the model a few
blocks at a time and keeps the hidden states in between on disk: neither the weights nor the accumulators of all blocks
are ever on its device, and a killed pass goes on at the last finished group of blocks. Several processes share the
windows; which of them did a batch shows nowhere in the folder, so that any number of them goes on with what another
number left.

An expert's layers read the tokens that are routed to it, and have their moments. Where these are too few, nothing of
the expert is written, and it stays dense (`routing`).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.calibration.moments import MomentAccumulator, Moments, RoutedAccumulator, check_finite
from lowrank.calibration.routing import LEFT_DENSE, TOKENS, least_tokens, left_dense_of, tokens_of, watched
from lowrank.config.sources import ModelShape
from lowrank.files import layer_files, layer_name, load_tensors, require_tensors, save_tensors, write_json
from lowrank.jobs.beside import Writer, read_ahead
from lowrank.jobs.pace import told
from lowrank.jobs.share import ALONE, Share
from lowrank.manifest import load_layer
from lowrank.model.checkpoint import family_of, load_checkpoint
from lowrank.model.families import Family, LinearType, family_for
from lowrank.model.runtime import parse_dtype, pick_device

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


def collect_share(arguments: dict[str, Any], share: Share) -> None:
    """A process's share of the pass.

    Args:
        arguments: "model" (folder), "dtype", "tokens" (file of the calibration windows), "layers_per_pass", "state",
            "expert_tokens" (as of `collect_statistics`).
        share: this process among those of the job.
    """
    device = pick_device()
    model = load_checkpoint(arguments["model"], parse_dtype(arguments["dtype"]))
    tokens = load_tensors(arguments["tokens"], ("tokens",))["tokens"].long()
    layers_per_pass, state, least = arguments["layers_per_pass"], Path(arguments["state"]), arguments["expert_tokens"]
    collect_statistics(model, tokens, layers_per_pass, state, device, share, least)


def collect_statistics(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    layers_per_pass: int,
    state: Path,
    device: torch.device,
    share: Share = ALONE,
    expert_tokens: int | None = None,
) -> list[Path]:
    """Collect the moments of all input sites of all blocks.

    Args:
        model: the dense model; it may be larger than the device's memory.
        tokens: windows x length token ids.
        layers_per_pass: blocks whose weights and accumulators are on the device at once.
        state: folder of unfinished work; finished layer files and hidden states live there.
        device: where to compute.
        share: this process among those of the job, which all see `state`.
        expert_tokens: of an expert that gets fewer tokens nothing is written; None: as many as its widest input has
            features.

    Returns:
        One safetensors file per block, in `state`.
    """
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    files = [state / layer_name(layer) for layer in range(len(blocks))]
    first = _first_block(state, files, layers_per_pass)
    started = time.monotonic()
    head = model.get_output_embeddings()  # is never reached
    around = [module for name, module in model.named_modules() if not f"{name}.".startswith(f"{family.blocks}.")]
    shallow = [tensor for module in around if module is not head for tensor in _own_tensors(module)]
    with Writer() as writer:
        for start in range(first, len(blocks), layers_per_pass):
            layers = range(start, min(start + layers_per_pass, len(blocks)))
            modules = [module for layer in layers for module in blocks[layer].modules()]
            with _moved([*shallow, *(tensor for module in modules for tensor in _own_tensors(module))], device):
                _pass(model, family, tokens, size, layers, state, device, share, expert_tokens, writer)
            # No process is past its sums before all are, and nobody reads these any more.
            if share.first:
                writer.do(partial(shutil.rmtree, _hidden_folder(state, start), ignore_errors=True))
            rate = tokens.numel() * (layers.stop - first) / len(blocks) / (time.monotonic() - started)
            log.info("statistics: blocks %d-%d of %d done, %.0f tokens/s", start, layers.stop - 1, len(blocks), rate)
    return files


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module, without those of the modules in it."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@contextmanager
def _moved(tensors: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers on a device, for a while: copies, if they are elsewhere, that are dropped afterwards."""
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@torch.inference_mode()
def _pass(
    model: PreTrainedModel,
    family: Family,
    tokens: torch.Tensor,
    size: int,
    layers: range,
    state: Path,
    device: torch.device,
    share: Share,
    expert_tokens: int | None,
    writer: Writer,
) -> None:
    """Run some blocks on all windows, `size` at a time; their moments go to disk, and what the next ones read."""
    blocks: Any = model.get_submodule(family.blocks)
    accumulators = _accumulators(family, blocks, layers, device)
    batches = torch.split(tokens, size)
    mine = share.of(len(batches))
    stored = read_ahead(partial(_load_hidden, state, layers.start), mine) if layers.start else repeat(None)
    for index, entering in zip(told(mine, f"statistics: blocks {layers[0]}-{layers[-1]}"), stored, strict=False):
        inputs = block_inputs(model, family, batches[index].to(device))
        states = inputs.hidden if entering is None else entering.to(inputs.hidden)
        for layer in layers:
            states = _run_block(family, blocks[layer], layer, states, inputs.arguments[layer], accumulators)
        if layers.stop < len(blocks):
            writer.do(partial(save_tensors, _hidden_file(state, layers.stop, index), {"hidden": states}))
    writer.wait()  # the other processes' marker stands for these files, too
    for accumulator in accumulators.values():
        accumulator.add_up(share, mine.start * size, *tokens.shape)
    if share.first:
        for layer in layers:
            of_block = {site: found for (owner, site), found in accumulators.items() if owner == layer}
            tensors = {name: tensor.cpu() for name, tensor in _tensors(family, layer, of_block, expert_tokens).items()}
            writer.do(partial(save_tensors, state / layer_name(layer), tensors))
        writer.do(partial(write_json, _marker(state, layers.stop), {"batches": len(batches)}))


def _hidden_folder(state: Path, layer: int) -> Path:
    """The hidden states that enter a block, one file a batch."""
    return state / f"hidden_{layer:03d}"


def _hidden_file(state: Path, layer: int, batch: int) -> Path:
    return _hidden_folder(state, layer) / f"batch_{batch:05d}.safetensors"


def _marker(state: Path, layer: int) -> Path:
    """Written when everything before a block is finished."""
    return _hidden_folder(state, layer) / "complete.json"


def _load_hidden(state: Path, layer: int, batch: int) -> torch.Tensor:
    return load_tensors(_hidden_file(state, layer, batch), ("hidden",), state)["hidden"]


def _first_block(state: Path, files: list[Path], layers_per_pass: int) -> int:
    """The block to go on with: after the last group whose files and outputs are all there."""
    for layer in (len(files), *reversed(range(layers_per_pass, len(files), layers_per_pass))):
        if _marker(state, layer).is_file() and all(file.is_file() for file in files[:layer]):
            log.info("statistics: blocks 0-%d were finished before", layer - 1)
            return layer
    return 0


@dataclass(frozen=True)
class Statistics:
    """The collected moments of a model: a folder with one file a block.

    Attributes:
        folder: the `layers` folder of the rule that collected them.
        shape: of the model.
    """

    folder: str | Path
    shape: ModelShape

    def of(self, layer: int) -> dict[str, Moments]:
        """Input site -> moments, of one block."""
        files = layer_files(self.folder, self.shape.layers)
        return load_moments(files[layer], family_for(self.shape).sites)


def load_moments(path: Path, sites: Mapping[str, LinearType]) -> dict[str, Moments]:
    """The moments of the input sites of a block, but for those of experts that are left dense."""
    tensors = load_layer(path)
    few = left_dense_of(tensors)
    kept = [site for site, linear in sites.items() if linear.expert not in few]
    require_tensors(path, tensors, [name for site in kept for name in Moments.names(site)], path.parent)
    return {site: Moments.from_tensors(tensors, site) for site in kept}


def _accumulators(
    family: Family, blocks: nn.ModuleList, layers: range, device: torch.device
) -> dict[tuple[int, str], MomentAccumulator]:
    accumulators = {}
    for layer in layers:
        for site, linear in family.sites.items():
            module: Any = blocks[layer].get_submodule(linear.path)
            kind = MomentAccumulator if linear.expert is None else RoutedAccumulator
            accumulators[layer, site] = kind(module.in_features, device)
    return accumulators


def block_inputs(model: PreTrainedModel, family: Family, ids: torch.Tensor) -> BlockInputs:
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
    """Run one block on a batch, adding the inputs of its linear layers to their accumulators.

    Raises:
        RankwiseError: values that are not finite; the layer is named.
    """
    handles: list[Any] = []
    with watched(block, family) as routed:
        for site, linear in family.sites.items():
            where = f"{family.blocks}.{layer}.{linear.path}"
            hook = _recorder(accumulators[layer, site], linear.expert, hidden.shape[:2], routed, where)
            handles.append(block.get_submodule(linear.path).register_forward_pre_hook(hook))
        try:
            output = block(hidden, **arguments)
        finally:
            for handle in handles:
                handle.remove()
        called = set(torch.unique(routed[-1]).tolist()) if routed else set()
        for site, linear in family.sites.items():
            accumulator = accumulators[layer, site]
            if isinstance(accumulator, RoutedAccumulator) and linear.expert not in called:
                accumulator.pass_over(hidden.shape[0])
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    check_finite(states, f"{family.blocks}.{layer}: outputs")
    return states


def _recorder(
    accumulator: MomentAccumulator, expert: int | None, batch: Sequence[int], routed: list[torch.Tensor], where: str
) -> Any:
    """A hook that adds what a layer reads, of a batch of (windows, tokens) each."""
    windows, length = batch

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if expert is not None and isinstance(accumulator, RoutedAccumulator):
            of_window = tokens_of(expert, routed[-1]) // length
            accumulator.update_routed(args[0], of_window, windows, where)
        else:
            accumulator.update(args[0].reshape(windows, length, -1), where)

    return record


def _tensors(
    family: Family, layer: int, accumulators: dict[str, MomentAccumulator], expert_tokens: int | None
) -> dict[str, torch.Tensor]:
    """What the file of a block holds."""
    tokens: dict[int, int] = {}
    widths: dict[int, list[int]] = {}
    for site, linear in family.sites.items():
        accumulator = accumulators[site]
        if isinstance(accumulator, RoutedAccumulator) and linear.expert is not None:
            tokens[linear.expert] = accumulator.tokens
            widths.setdefault(linear.expert, []).append(len(accumulator.absolute))
    few = [expert for expert, count in tokens.items() if count < least_tokens(expert_tokens, widths[expert])]
    for expert in few:
        log.warning(
            "%s.%d.%s.%d got %d tokens, fewer than %d: its matrices stay dense",
            *(family.blocks, layer, family.experts, expert, tokens[expert]),
            least_tokens(expert_tokens, widths[expert]),
        )
    tensors: dict[str, torch.Tensor] = {}
    for site, linear in family.sites.items():
        if linear.expert not in few:
            tensors |= accumulators[site].result().tensors(site)
    if tokens:
        tensors[TOKENS] = torch.tensor([tokens[expert] for expert in sorted(tokens)])
        tensors[LEFT_DENSE] = torch.tensor(sorted(few), dtype=torch.int64)
    return tensors
