"""`make export`: a checkpoint in a form that others read, with a model card that says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.export.blocks import base_shape
from lowrank.export.dense import Stock, stock_model, write_stock
from lowrank.export.gguf import write_gguf
from lowrank.export.numbers import measured
from lowrank.export.wish import Export
from lowrank.files import atomic_path, read_record
from lowrank.model.card import LOADING, loading
from lowrank.model.checkpoint import CARD, copy_companions, load_checkpoint
from lowrank.model.parameters import count_parameters, dense_total
from lowrank.model.runtime import parse_dtype


def export(wish: Export) -> str:
    """Write it; nothing is left of what fails.

    Returns:
        What came out, in a line.

    Raises:
        RankwiseError: a damaged checkpoint, or a form that cannot hold it.
    """
    makers: dict[str, Callable[[Export], str]] = {"same": _same, "dense": _dense, "gguf": _gguf}
    return makers[wish.to](wish)


def _same(wish: Export) -> str:
    """The checkpoint as it is, with its numbers in its card."""
    load_checkpoint(wish.checkpoint, _dtype(wish.checkpoint))  # it is compared with its manifest here
    with atomic_path(wish.out) as folder:
        folder.mkdir()
        for path in sorted(wish.checkpoint.iterdir()):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        head, loads = _card(wish.checkpoint)
        numbers = measured(wish.checkpoint)
        (folder / CARD).write_text(head + (f"\n{numbers}" if numbers else "") + LOADING + loads, encoding="utf-8")
    return f"{wish.out}: the same checkpoint" + ("" if numbers else "; no evaluation of it was found")


def _dense(wish: Export) -> str:
    """A checkpoint of the base architecture."""
    model = _opened(wish)
    stock = stock_model(model)
    with atomic_path(wish.out) as folder:
        folder.mkdir()
        write_stock(stock, folder)
        copy_companions(wish.checkpoint, folder)
        head, _ = _card(wish.checkpoint)
        numbers = measured(wish.checkpoint)
        text = (
            head
            + f"\n{_about(stock, model)}\n"
            + (f"\n{numbers}" if numbers else "")
            + LOADING
            + loading(trusted=False)
        )
        (folder / CARD).write_text(text, encoding="utf-8")
    name, saves = stock.config["architectures"][0], _saves_nothing(stock, model)
    said = f"{wish.out}: {name}, {stock.parameters:,} parameters, {stock.zeros:,} of them zeros"
    return f"{said}; {saves}" if saves else said


def _gguf(wish: Export) -> str:
    """A GGUF file."""
    architecture = write_gguf(_opened(wish), wish.checkpoint, wish.out)
    size, before = (
        sum(file.stat().st_size for file in files) for files in ([wish.out], wish.checkpoint.glob("*.safetensors"))
    )
    said = f"{wish.out}: architecture {architecture}, {size:,} bytes"
    # Metadata and a tokenizer are in a GGUF file as well, so it is a little larger in any case.
    if size > 1.1 * before:
        said += (
            f", the checkpoint {before:,}: what it saves is multiplied out here; llama-quantize makes the file small"
        )
    return said


def _opened(wish: Export) -> PreTrainedModel:
    return load_checkpoint(wish.checkpoint, _dtype(wish.checkpoint))


def _dtype(checkpoint: Path) -> torch.dtype:
    """The dtype in which a checkpoint is stored."""
    built = read_record(checkpoint / "config.json")
    named = [built[key] for key in ("dtype", "torch_dtype") if built.get(key) is not None]  # the latter in older files
    if not named:
        raise RankwiseError(f"{checkpoint / 'config.json'}: states no `dtype`; add that of the weights.")
    return parse_dtype(str(named[0]))


def _card(checkpoint: Path) -> tuple[str, str]:
    """A checkpoint's card up to how it is loaded, and that."""
    file = checkpoint / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else f"# {checkpoint.name}\n"
    head, mark, loads = text.partition(LOADING)
    return head, loads if mark else loading(trusted=any(checkpoint.glob("*.py")))


def _about(stock: Stock, model: PreTrainedModel) -> str:
    """What became of a checkpoint that was multiplied out."""
    before, saves = count_parameters(model, base_shape(model))["total"], _saves_nothing(stock, model)
    shape = {
        key: stock.config[key] for key in ("intermediate_size", "ffn_dim", "num_attention_heads") if key in stock.config
    }
    return (
        "## This form\n\nMultiplied out for tools that know the base architecture alone: "
        f"{stock.config['architectures'][0]} with {json.dumps(shape)}, {stock.parameters:,} parameters where the "
        f"compressed checkpoint has {before:,}{', ' * bool(saves)}{saves}. Of these, {stock.zeros:,} are zeros that "
        "the architecture asks for: blocks that are narrower than the widest, and biases of layers that have none. Its "
        "outputs are the same up to rounding; numbers above and below are of the compressed checkpoint."
    )


def _saves_nothing(stock: Stock, model: PreTrainedModel) -> str:
    """That a checkpoint multiplied out has as many parameters as its base, as all pairs do; empty if it has fewer."""
    base = dense_total(model)
    if stock.parameters < base:
        return ""
    return f"as large as the base ({base:,} parameters): nothing is saved in this form"
