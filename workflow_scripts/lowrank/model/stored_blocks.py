"""The linear layers of a dense checkpoint, read block by block: no job that needs no more loads the whole model."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lowrank.errors import RankwiseError
from lowrank.manifest import check_manifest
from lowrank.model.checkpoint import stored_name
from lowrank.model.families import Dimensions, Family, LinearModule, LinearType, family_for, linear_modules

Layer = tuple[torch.Tensor, torch.Tensor | None]
"""Weight, m x n, and bias, m, of a dense layer."""


class StoredBlocks:
    """The files of a dense checkpoint.

    Attributes:
        family: of the model.
    """

    def __init__(self, folder: str | Path, shape: Dimensions, dtype: torch.dtype) -> None:
        """Look up which file has what; weights stay on disk.

        Args:
            folder: of the checkpoint.
            shape: of the model.
            dtype: that layers are given in.

        Raises:
            RankwiseError: there are no readable weights, or a file is not the one that the manifest describes.
        """
        self.family: Family = family_for(shape)
        self._folder, self._dtype = Path(folder), dtype
        self._rows = {(module.layer, module.type.key): module.out_features for module in linear_modules(shape)}
        check_manifest(self._folder, "files")
        self._files = dict(self._names())
        if not self._files:
            raise RankwiseError(f"{folder}: holds no weights. Delete the folder and run the workflow again.")

    def of(self, layer: int, sites: Container[str] | None = None) -> dict[LinearType, Layer]:
        """Type -> weight and bias, of one block; fused projections (Phi-3) are taken apart.

        Args:
            layer: the block's number.
            sites: input sites; layers that read no such site are left out, as are experts without statistics. None:
                all layers.

        Raises:
            RankwiseError: a tensor is missing or damaged; it is named.
        """
        with ExitStack() as opened:
            return {
                linear: self._layer(layer, linear, opened)
                for linear in self.family.types
                if sites is None or linear.site in sites
            }

    def layers(self, modules: Sequence[LinearModule]) -> list[Layer]:
        """Weight and bias of some layers.

        Raises:
            RankwiseError: as `of`.
        """
        with ExitStack() as opened:
            return [self._layer(module.layer, module.type, opened) for module in modules]

    def _layer(self, layer: int, linear: LinearType, opened: ExitStack) -> Layer:
        block = f"{self.family.blocks}.{layer}"
        fused = {name: path for path, names in self.family.fused.items() for name in names}
        weight = self._weight(f"{block}.{fused.get(linear.name, linear.path)}.weight", layer, linear, opened)
        return weight, self._tensor(f"{block}.{linear.path}.bias", opened)

    def _names(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    yield from ((name, path) for name in file.keys())  # noqa: SIM118 - it cannot be iterated
            except (SafetensorError, OSError) as error:
                raise self._damaged(str(error)) from error

    def _weight(self, name: str, layer: int, linear: LinearType, opened: ExitStack) -> torch.Tensor:
        rows: slice | None = None
        for names in self.family.fused.values():
            if linear.name in names:
                before = names[: names.index(linear.name)]
                first = sum(self._rows[layer, other] for other in before)
                rows = slice(first, first + self._rows[layer, linear.key])
        weight = self._tensor(name, opened, rows)
        if weight is None:
            raise self._damaged(f"no tensor {name}")
        return weight

    def _tensor(self, name: str, opened: ExitStack, rows: slice | None = None) -> torch.Tensor | None:
        """A tensor, or some of its rows, in memory of its own; None if there is none of this name."""
        name = stored_name(name, self.family)
        if name not in self._files:  # a base model is stored without the prefix
            name = name.removeprefix(f"{self.family.blocks.partition('.')[0]}.")
        path = self._files.get(name)
        if path is None:
            return None
        try:
            file: Any = opened.enter_context(safe_open(path, framework="pt"))
            found: torch.Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{name}: {error}") from error
        return found.to(self._dtype)

    def _damaged(self, what: str) -> RankwiseError:
        return RankwiseError(f"{self._folder}: damaged weights: {what}. Delete the folder and run the workflow again.")
