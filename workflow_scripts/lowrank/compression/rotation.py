"""Principal bases of the residual stream, one place after another, and the layers written in them (SliceGPT).

A root mean square norm without gain commutes with rotations, so a layer that reads the normed stream x may read Q' x by
`W diag(gain) Q`, one that writes to it may write in the basis Q by `Q' W`, and a residual connection between two bases
is `Q_next' Q`. With all channels nothing changes; a prefix of the columns of Q projects the stream. Each basis is that
of the stream which the places before it, cut already, leave: what they lost is not modelled twice.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.bases.principal import fix_signs
from lowrank.calibration.statistics import TOKENS_PER_BATCH, block_inputs
from lowrank.compression.slicing import READS, WRITES, Widths, require_plain_branches
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.families import Family, LinearType
from lowrank.model.replacements import NormWithoutGain, Replacement, ResidualShortcuts, SmallerLinear

log = logging.getLogger(__name__)

DAMPING = 0.01
"""Share of the mean diagonal that is added to a second moment: no direction changes, but its inverse exists."""


@dataclass(frozen=True)
class Branch:
    """One of the two branches of a block, with its norm: `x + body(norm(x))`.

    Attributes:
        norm: path of the norm inside the block.
        body: path of the branch.
        place: how many places behind the block's first it is entered, 0 or 1.
        readers: types of linear layers that read the normed stream.
        writer: the one that writes to the stream.
    """

    norm: str
    body: str
    place: int
    readers: tuple[LinearType, ...]
    writer: LinearType


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns, d x k in float64, in which the stream is written at one place; None: its own basis."""

    columns: torch.Tensor | None = None

    def read(self, weight: torch.Tensor) -> torch.Tensor:
        """`W Q`: a matrix m x d that reads what is written in this basis."""
        return weight if self.columns is None else weight @ self.columns

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """`Q' W`: a matrix d x n (or a bias, d) that writes in this basis."""
        return weight if self.columns is None else self.columns.T @ weight

    def onto(self, states: torch.Tensor) -> torch.Tensor:
        """`X Q`: the stream's states, rows x d, in this basis, in their dtype."""
        return states if self.columns is None else states @ self.columns.to(states.dtype)

    def back(self, states: torch.Tensor) -> torch.Tensor:
        """`X Q'`: states in this basis, rows x k, in the stream's own."""
        return states if self.columns is None else states @ self.columns.T.to(states.dtype)


def rotate_and_slice(
    model: PreTrainedModel, tokens: torch.Tensor, widths: Widths, device: torch.device
) -> dict[str, Replacement]:
    """Write every block of a model in principal bases of the residual stream that it would see once sliced.

    The states of all calibration tokens are held on the host, in the model's dtype, and visit the device batch by
    batch: their memory is tokens x d numbers.

    Args:
        model: the dense model; it is not changed.
        tokens: windows x length token ids.
        widths: channels at each of the 2 L + 1 places; the first and the last are d.
        device: where the blocks run and the bases are computed.

    Returns:
        What becomes of the linear layers, the norms and the residual connections of every block.

    Raises:
        RankwiseError: a family whose blocks or norms cannot be rotated, or a stream that is not finite; named.
    """
    family = family_of(model)
    branches = branches_of(family)
    stream = Stream(model, family, tokens, device)
    replacements: dict[str, Replacement] = {}
    basis = Basis()
    for layer, dense in enumerate(_blocks(model, family)):
        block = copy.deepcopy(dense).to(device)
        shortcuts: list[torch.Tensor] = []
        for branch in branches:
            width = widths[2 * layer + branch.place + 1]
            last = 2 * layer + branch.place + 2 == len(widths)
            where = f"{family.blocks}.{layer}"
            changed = readers_in_basis(block, branch, basis)
            following = Basis() if last else stream.advance(layer, block, branch, changed, basis, width, where)
            changed |= writer_in_basis(block, branch, following)
            shortcuts.append(_shortcut(basis, following, widths[0], device))
            replacements |= {f"{where}.{path}": _stored(change, model.dtype) for path, change in changed.items()}
            basis = following
        replacements[where] = ResidualShortcuts(*(weight.to("cpu", model.dtype) for weight in shortcuts))
        log.info("sliced block %d of %d", layer + 1, len(stream.blocks))
    return replacements


def branches_of(family: Family) -> tuple[Branch, Branch]:
    """The two branches of the blocks of a family.

    Raises:
        RankwiseError: blocks of another build.
    """
    require_plain_branches(family.model_type)
    readers = [tuple(t for t in family.types if READS.get(t.site) == place) for place in (0, 1)]
    writers = [next(t for t in family.types if WRITES.get(t.site) == place) for place in (1, 2)]
    attention = Branch("input_layernorm", "self_attn", 0, readers[0], writers[0])
    mlp = Branch("post_attention_layernorm", "mlp", 1, readers[1], writers[1])
    return attention, mlp


class Stream:
    """The residual stream of the calibration windows at one place of a model that is being sliced.

    Attributes:
        states: of each batch, rows x length x k, on the host.
    """

    def __init__(self, model: PreTrainedModel, family: Family, tokens: torch.Tensor, device: torch.device) -> None:
        """Embed the windows."""
        self.device = device
        self.blocks = list(_blocks(model, family))
        self.states: list[torch.Tensor] = []
        self.arguments: dict[int, list[dict[str, Any]]] = {}
        with torch.inference_mode():
            for ids in torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1])):
                inputs = block_inputs(model, family, ids.to(model.device))
                self.states.append(inputs.hidden.cpu())
                # Windows are equally long and have no padding: batches of as many windows share their other arguments.
                self.arguments.setdefault(len(ids), inputs.arguments)

    @torch.inference_mode()
    def advance(
        self,
        layer: int,
        block: nn.Module,
        branch: Branch,
        changed: dict[str, Replacement],
        basis: Basis,
        width: int,
        where: str,
    ) -> Basis:
        """Run a branch on all batches and go on in the principal basis of what it leaves.

        Args:
            layer: index of the block.
            block: the block on this stream's device, whose branch is changed as `changed` says.
            branch: which of its branches.
            changed: its norm and readers in `basis`.
            basis: in which the stream is written now.
            width: columns of the new basis.
            where: name of the block, for errors.
        """
        _change(block, changed)
        moment: torch.Tensor | None = None
        for index, entered in enumerate(self.states):
            states = basis.back(entered.to(self.device)) + self._run(layer, block, branch, entered)
            rows = states.flatten(0, 1).double()
            moment = rows.T @ rows if moment is None else moment + rows.T @ rows
            self.states[index] = states.cpu()
        assert moment is not None
        following = Basis(principal_columns(moment, f"{where}, behind {branch.body}")[:, :width])
        for index, states in enumerate(self.states):
            self.states[index] = following.onto(states.to(self.device)).cpu()
        return following

    def _run(self, layer: int, block: nn.Module, branch: Branch, entered: torch.Tensor) -> torch.Tensor:
        """What a branch adds to the stream, in the stream's own basis."""
        normed = block.get_submodule(branch.norm)(entered.to(self.device))
        body = block.get_submodule(branch.body)
        if branch.place:
            fed: torch.Tensor = body(normed)
            return fed
        arguments = self.arguments[len(entered)][layer]
        attended: torch.Tensor = body(hidden_states=normed, **_moved(arguments, self.device))[0]
        return attended


def principal_columns(moment: torch.Tensor, where: str) -> torch.Tensor:
    """All eigenvectors of a second moment (d x d, float64), by decreasing eigenvalue.

    Raises:
        RankwiseError: it is not finite, or cannot be decomposed.
    """
    if not bool(moment.isfinite().all()):
        raise RankwiseError(
            f"{where}: the residual stream is not finite. Set `dtype: float32` for this model in the config; "
            "if it is float32 already, the weights are damaged."
        )
    damped = (moment + moment.T) / 2
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    try:
        _, vectors = torch.linalg.eigh(damped)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankwiseError(f"{where}: the eigendecomposition of the residual stream failed: {error}") from error
    return fix_signs(vectors.flip(1))


def readers_in_basis(block: nn.Module, branch: Branch, basis: Basis) -> dict[str, Replacement]:
    """The norm of a branch without its gain, and the layers behind it, which take over the gain and read in a basis."""
    norm: Any = block.get_submodule(branch.norm)
    gain = norm.weight.double()
    changed: dict[str, Replacement] = {branch.norm: NormWithoutGain(len(gain), float(norm.variance_epsilon))}
    for reader in branch.readers:
        layer: Any = block.get_submodule(reader.path)
        changed[reader.path] = SmallerLinear(basis.read(layer.weight.double() * gain), layer.bias)
    return changed


def writer_in_basis(block: nn.Module, branch: Branch, basis: Basis) -> dict[str, Replacement]:
    """The layer of a branch that writes to the stream, writing in a basis."""
    layer: Any = block.get_submodule(branch.writer.path)
    bias = None if layer.bias is None else basis.write(layer.bias.double())
    return {branch.writer.path: SmallerLinear(basis.write(layer.weight.double()), bias)}


def _shortcut(before: Basis, after: Basis, hidden: int, device: torch.device) -> torch.Tensor:
    """`Q_after' Q_before`, the weight of the residual connection between two bases, in float64."""
    return after.write(before.read(torch.eye(hidden, dtype=torch.float64, device=device)))


def _change(block: nn.Module, changed: dict[str, Replacement]) -> None:
    """Put a norm and layers into a block, in the block's dtype and on its device."""
    like = next(block.parameters())
    for path, change in changed.items():
        assert isinstance(change, NormWithoutGain | SmallerLinear)
        parent, _, child = path.rpartition(".")
        setattr(block.get_submodule(parent), child, change.as_module(like.dtype, like.device))


def _stored(change: Replacement, dtype: torch.dtype) -> Replacement:
    """What waits for the rest of the model; norms are small as they are."""
    return change.stored(dtype) if isinstance(change, SmallerLinear) else change


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside the arguments of a block, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value


def _blocks(model: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    yield from blocks
