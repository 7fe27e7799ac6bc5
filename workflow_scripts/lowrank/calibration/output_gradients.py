"""Second moments of the loss gradient at the outputs of every linear layer: what an error of each output costs.

To second order, and with the Fisher information in place of the Hessian, an error e_t of a layer's output y_t raises
the mean loss per token by 1/2 E[(g_t' e_t)^2], where g_t is the gradient of the summed next-token loss at y_t. For
errors that do not depend on g_t this is 1/2 tr(G Cov(e)) with G = E[g_t g_t'], which is what is collected here: one
m x m matrix a layer, from one backward pass over the calibration windows. The mean is over the tokens that a next one
is predicted of; on the last of a window no loss depends.

The Fisher information itself takes the next tokens from the model's own predictions, not from the text; with `draws`
they are drawn from there (Kunstner et al. 2019 on the difference). And each of several draws from one window brings
other gradients, so that few windows give a less noisy G, at the cost of as many backward passes.

The pass takes a few blocks at a time, from the last to the first, so that accumulators of all layers are never held at
once; a backward pass goes no deeper than the blocks it is for. A killed pass goes on at the last finished group.
Several processes share the windows and add up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.calibration.gradients import backpropagate
from lowrank.calibration.gram import add_gram, add_gram_of_halves, packed, prefers_parts, symmetric, unpacked
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_files, layer_name, load_tensors, save_tensors
from lowrank.jobs.beside import Writer
from lowrank.jobs.pace import told
from lowrank.jobs.share import ALONE, Share
from lowrank.jobs.state import SECONDS, Clock
from lowrank.manifest import load_layer
from lowrank.model.checkpoint import family_of, load_checkpoint
from lowrank.model.devices import pick_devices
from lowrank.model.families import Family, family_for
from lowrank.model.runtime import parse_dtype

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = 512
"""A backward pass keeps all activations of the blocks it goes through."""


def collect_share(arguments: dict[str, Any], share: Share) -> None:
    """A process's share of the passes.

    Args:
        arguments: as of `statistics.collect_share`, and "windows": how many of the calibration windows, or None;
            "draws": as of `collect_output_gradients`.
        share: this process among those of the job.
    """
    layers_per_pass, draws, state = arguments["layers_per_pass"], arguments["draws"], Path(arguments["state"])
    clock = Clock(state / SECONDS)
    model = load_checkpoint(arguments["model"], parse_dtype(arguments["dtype"]), pick_devices())
    tokens = load_tensors(arguments["tokens"], ("tokens",))["tokens"].long()[: arguments["windows"]]
    collect_output_gradients(model, tokens, layers_per_pass, state, model.device, share, draws, clock)


def collect_output_gradients(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    layers_per_pass: int,
    state: Path,
    device: torch.device,
    share: Share = ALONE,
    draws: int | None = None,
    clock: Clock | None = None,
) -> list[Path]:
    """Collect G = E[g g'] for all linear layers of all blocks.

    Args:
        model: the dense model, with no parameter that requires a gradient.
        tokens: windows x length token ids.
        layers_per_pass: blocks whose accumulators are held at once.
        state: folder of unfinished work; finished layer files live there.
        device: where the model is, or its embeddings are.
        share: this process among those of the job, which all see `state`.
        draws: G is the mean over so many next tokens drawn at each position; None: for those of the text.
        clock: of the job; it is saved with each group of blocks.

    Returns:
        One safetensors file per block, in `state`, with the key of a type -> m x m in float32, packed. An
        expert's gradient is zero for tokens that it does not get: its G is that of an error of its own outputs, in the
        mean over all tokens that a next one is predicted of.

    Raises:
        RankwiseError: windows of one token, or a gradient that is not finite; the layer is named.
    """
    if tokens.shape[1] < 2:
        raise RankwiseError(f"gradients need windows of two tokens or more, not of {tokens.shape[1]}")
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    files = [state / layer_name(layer) for layer in range(len(blocks))]
    batches = torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    with Writer() as writer:
        for start in reversed(range(0, len(blocks), layers_per_pass)):
            layers = range(start, min(start + layers_per_pass, len(blocks)))
            if all(files[layer].is_file() for layer in layers):
                log.info("gradients: blocks %d-%d were finished before", layers[0], layers[-1])
                continue
            started = time.monotonic()
            moments = _accumulators(family, blocks, layers)
            with _caught(family, blocks, moments), torch.enable_grad():
                for index in told(share.of(len(batches)), f"gradients: blocks {layers[0]}-{layers[-1]}"):
                    # The same tokens in each pass, in whatever process.
                    draw = None if draws is None else torch.Generator(device).manual_seed(index)
                    backpropagate(model, batches[index].to(device), draw, draws or 1)
            for total in moments.values():
                share.sum(total)
            if share.first:
                _store(family, files, moments, tokens[:, 1:].numel() * (draws or 1), writer)
                if clock:
                    clock.save()
            del moments, total  # before the next pass makes its own
            rate = tokens.numel() / (time.monotonic() - started)
            log.info("gradients: blocks %d-%d of %d done, %.0f tokens/s", layers[0], layers[-1], len(blocks), rate)
    return files


@dataclass(frozen=True)
class OutputGradients:
    """The collected second moments of a model: a folder with one file a block.

    Attributes:
        folder: the `layers` folder of the rule that collected them.
        shape: of the model.
    """

    folder: str | Path
    shape: ModelShape

    def of(self, layer: int) -> dict[str, torch.Tensor]:
        """Key of a type -> G of one block, m x m."""
        types = [linear.key for linear in family_for(self.shape).types]
        return load_output_gradients(layer_files(self.folder, self.shape.layers)[layer], types)


def load_output_gradients(path: Path, types: Iterable[str]) -> dict[str, torch.Tensor]:
    """Key of a type -> G of one block, m x m."""
    types = list(types)
    tensors = load_layer(path, types)
    return {name: unpacked(tensors[name]) for name in types}


def _accumulators(family: Family, blocks: nn.ModuleList, layers: range) -> dict[tuple[int, str], torch.Tensor]:
    moments = {}
    for layer in layers:
        for linear in family.types:
            module: Any = blocks[layer].get_submodule(linear.path)
            size = module.out_features
            moments[layer, linear.key] = torch.zeros(size, size, dtype=torch.float64, device=module.weight.device)
    return moments


@contextmanager
def _caught(family: Family, blocks: nn.ModuleList, moments: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """Hooks that start the graph at the first of the blocks and add every gradient to its accumulator."""

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}

    def record(total: torch.Tensor) -> Any:
        def add(gradient: torch.Tensor) -> None:
            g = gradient.detach().flatten(0, -2)
            if prefers_parts(g):
                add_gram_of_halves(total, g)
            else:
                add_gram(total, g.to(torch.promote_types(g.dtype, torch.float32)))

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    first = min(layer for layer, _ in moments)
    handles: list[Any] = [blocks[first].register_forward_pre_hook(begin, with_kwargs=True)]
    paths = {linear.key: linear.path for linear in family.types}
    for (layer, name), total in moments.items():
        handles.append(blocks[layer].get_submodule(paths[name]).register_forward_hook(record(total)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _store(
    family: Family, files: list[Path], moments: dict[tuple[int, str], torch.Tensor], count: int, writer: Writer
) -> None:
    """Have the means written.

    From a damaged layer the damage spreads backwards, so the one nearest to the loss is named.
    """
    damaged = [place for place, total in moments.items() if not bool(total.isfinite().all())]
    if damaged:
        layer, name = damaged[-1]
        path = next(linear.path for linear in family.types if linear.key == name)
        raise RankwiseError(
            f"{family.blocks}.{layer}.{path}: the gradient at its output is not finite. Set `dtype: float32` (or "
            "`bfloat16`) for this model in the config; if it is float32 already, look for damaged weights."
        )
    for layer in sorted({layer for layer, _ in moments}):
        means = {
            linear.key: packed(symmetric(moments[layer, linear.key]).div_(count).float()).cpu()
            for linear in family.types
        }
        writer.do(partial(save_tensors, files[layer], means))
