"""DeepSpeed's checkpoints without pickles: tensors as safetensors, everything else as JSON beside them.

DeepSpeed writes and reads the state of an engine through an object that can be replaced. Its own uses pickles, which
can run code when they are read and say nothing when a bit of them has changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, read_metadata, save_tensors

Tensors = dict[str, torch.Tensor]


def _loss_scaler(values: dict[str, Any]) -> LossScaler:
    scaler = LossScaler(values["cur_scale"])
    vars(scaler).update(values)
    return scaler


OBJECTS: dict[str, tuple[type, Callable[[dict[str, Any]], Any]]] = {
    "loss_scaler": (LossScaler, _loss_scaler),
    "fragment": (fragment_address, lambda values: fragment_address(**values)),
}
"""The only classes whose objects are read back: name -> class, and how an object is made of its attributes."""


class SafeCheckpoints(CheckpointEngine):  # type: ignore[misc]
    """Writes and reads what DeepSpeed hands over; the names of the files are DeepSpeed's.

    Attributes:
        folder: what is to be deleted if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def create(self, info: Any) -> None:
        """Nothing is to be prepared."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a state, atomically and with a checksum.

        Raises:
            RankwiseError: it holds something that is no plain value, or a number that is not finite.
        """
        tensors: Tensors = {}
        structure = _encode(state_dict, tensors)
        save_tensors(path, tensors, {"structure": json.dumps(structure)})

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a state back, on the CPU wherever it is wanted: DeepSpeed copies it into the tensors it has.

        Raises:
            RankwiseError: missing, damaged, or a file that `save` did not write, such as a pickle.
        """
        tensors = load_tensors(path, whole=self.folder)
        structure = read_metadata(path).get("structure")
        if structure is None:
            raise RankwiseError(
                f"{path}: no state of a training that this program wrote. Delete {self.folder} and run the workflow "
                "again."
            )
        return _decode(json.loads(structure), tensors)

    def commit(self, info: Any) -> bool:
        """All files are there when `save` returns."""
        return True


def _encode(value: Any, tensors: Tensors) -> Any:
    """A JSON value of [kind, content]; tensors go into `tensors` and leave their name."""
    if isinstance(value, torch.Tensor):
        name = f"tensor{len(tensors):05d}"
        tensors[name] = value.detach().cpu().clone()  # tensors that share memory cannot be stored
        return ["tensor", name]
    for kind, (type_, _) in OBJECTS.items():
        if isinstance(value, type_):
            return [kind, _encode(dict(vars(value)), tensors)]
    if value is None or isinstance(value, bool | str):
        return ["value", value]
    if isinstance(value, int | float):
        return ["value", int(value) if isinstance(value, int) else float(value)]  # enumerations are numbers too
    if isinstance(value, dict):
        return ["dict", [[_encode(key, tensors), _encode(item, tensors)] for key, item in value.items()]]
    if isinstance(value, torch.Size):
        return ["size", list(value)]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [_encode(item, tensors) for item in value]]
    raise RankwiseError(
        f"DeepSpeed's state holds an object of {type(value).__module__}.{type(value).__qualname__}, which is not "
        "stored. Use the pinned version of DeepSpeed (envs/requirements.txt), or another file of config/deepspeed."
    )


def _decode(encoded: Any, tensors: Tensors) -> Any:
    kind, content = encoded
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "size":
        return torch.Size(content)
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    _, make = OBJECTS[kind]
    return make(_decode(content, tensors))
