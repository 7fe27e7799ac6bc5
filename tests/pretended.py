"""Devices that are only pretended: tensors that say they are on one, and refuse to meet those of another.

Their numbers are in main memory, where torch's own kernels for processors compute. Every operation looks at its tensors
first, as CUDA does: all of them are on one device, but for copies from one to another. A device may have an end.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import finalize

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

TYPE = "lazy"
"""A type of device that torch has a name and no code for."""
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def devices(count: int) -> list[torch.device]:
    """So many pretended devices."""
    return [torch.device(TYPE, index) for index in range(count)]


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device.

    Attributes:
        inner: its numbers.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Elsewhere:
        layout = {"strides": inner.stride(), "dtype": inner.dtype, "device": device}
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, values: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PRETENDED[-1].run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Has pretended devices for a while.

    Attributes:
        room: bytes of each, or None.
        moves: (from, to) of every copy.
        used: device -> the largest number of bytes on it so far.
    """

    def __init__(self, room: int | None = None) -> None:
        super().__init__()
        self.room = room
        self.moves: list[tuple[str, str]] = []
        self.used: dict[str, int] = {}
        self._tensors: Counter[tuple[torch.device, int, int]] = Counter()
        self._total: Counter[torch.device] = Counter()
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Pretended:
        PRETENDED.append(self)
        for name in ("__enter__", "__exit__"):  # torch has no kernels of such a device in inference mode
            self._patches.setattr(torch.inference_mode, name, getattr(_NoGradients, name))
        # A module that goes elsewhere gets new parameters: new data of an old one would come without its numbers.
        self._patches.setattr(torch, "_has_compatible_shallow_copy_type", _both_here)
        self._patches.setattr(torch, "tensor", _made_here)  # whose operations are not seen
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.undo()
        PRETENDED.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: on the numbers, if they are all in one place."""
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        places = {str(tensor.device) for tensor in tensors if tensor.dim() or isinstance(tensor, Elsewhere)}
        if len(places) > 1 and function not in COPIES:
            raise AssertionError(f"{function}: its tensors are on {sorted(places)}")
        asked = kwargs.get("device")
        target = torch.device(asked) if asked is not None else self._home(tensors, function)
        if function is COPIES[0] and str(target) not in places:
            self.moves.append((*places, str(target)))  # type: ignore[arg-type]
        inner = kwargs | ({"device": "cpu"} if asked is not None and target.type == TYPE else {})
        result = function(*tree_map(_numbers, args), **tree_map(_numbers, inner))
        if function._schema.is_mutable and not function._schema.name.endswith(".out"):
            return args[0]
        return result if target.type != TYPE else tree_map(lambda value: self._there(value, target), result)

    def _home(self, tensors: list[torch.Tensor], function: Any) -> torch.device:
        return next((tensor.device for tensor in tensors if isinstance(tensor, Elsewhere)), torch.device("cpu"))

    def _there(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Elsewhere):
            return value
        made = Elsewhere(value.detach() if value.requires_grad else value, device)
        storage = made.inner.untyped_storage()
        held = (device, storage.data_ptr(), storage.nbytes())
        if not self._tensors[held]:
            self._total[device] += storage.nbytes()
        self._tensors[held] += 1
        finalize(made, self._gone, held)
        total = self._total[device]
        self.used[str(device)] = max(total, self.used.get(str(device), 0))
        if self.room is not None and total > self.room:
            raise torch.OutOfMemoryError(f"{device} holds {self.room} bytes, and {total} are wanted")
        return made

    def _gone(self, held: tuple[torch.device, int, int]) -> None:
        self._tensors[held] -= 1
        if not self._tensors[held]:
            self._total[held[0]] -= held[2]


PRETENDED: list[Pretended] = []


_tensor = torch.tensor


def _made_here(*values: Any, device: Any = None, **how: Any) -> torch.Tensor:
    """Made of values in main memory, and moved."""
    made = _tensor(*values, **how)
    return made if device is None else made.to(device)


_compatible = torch._has_compatible_shallow_copy_type


def _both_here(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not isinstance(one, Elsewhere) and not isinstance(other, Elsewhere) and bool(_compatible(one, other))


class _NoGradients:
    """What inference mode does while devices are pretended."""

    inside: torch.no_grad

    def __enter__(self) -> None:
        self.inside = torch.no_grad()
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)


def _numbers(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
