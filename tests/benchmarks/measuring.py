"""What the benchmarks share: sizes, models of random weights, turns of what is compared, rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank.bases.principal import PrincipalBasis
from lowrank.config.sources import ModelShape

SPREAD = 0.02
"""Standard deviation of random weights, as transformers draws them."""


@dataclass(frozen=True)
class Size:
    """How large models and texts are.

    Attributes:
        hidden: width of the residual stream.
        intermediate: of the MLP.
        heads: of attention; keys and values have as many.
        blocks: of a whole model.
        vocabulary: of its head.
        windows: of text, `length` tokens each.
        length: of a window.
        turns: how often what is compared takes turns.
        new_tokens: decoded in a turn.
        contexts: of zero-shot tasks, with four answers each.
        layers: what `layers` measures: blocks, and passes of a single token in a turn.
        grams: rows and features of products.
    """

    hidden: int
    intermediate: int
    heads: int
    blocks: int
    vocabulary: int
    windows: int
    length: int
    turns: int
    new_tokens: int
    contexts: int
    layers: tuple[int, int]
    grams: tuple[int, tuple[int, ...]]

    @property
    def shape(self) -> ModelShape:
        """Of the model, as a config has it."""
        return ModelShape(
            family="llama",
            layers=self.blocks,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            vocabulary=self.vocabulary,
            tied_embeddings=False,
        )


SIZES = {
    "tiny": Size(64, 160, 4, 2, 400, 2, 32, 2, 2, 2, (1, 1), (32, (48,))),
    "small": Size(768, 2048, 12, 3, 512, 4, 512, 3, 8, 6, (2, 5), (512, (576, 1536))),
    "7b": Size(4096, 11008, 32, 32, 32000, 8, 4096, 5, 32, 60, (8, 10), (4096, (4096, 11008))),
}


@dataclass(frozen=True)
class Setting:
    """Where and how large: `device` is "cpu" or "cuda", `dtypes` those of weights and activations.

    `model` is a folder with a small model, for the peaks of memory.
    """

    size: Size
    device: str
    dtypes: tuple[str, ...]
    model: Path | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measure: what is measured, and against what.
        dtype: of weights and activations; "" where there are none.
        unit: "times" (a ratio), or that of a plain number.
        median: over the turns.
        low: with `high` the middle half of the turns.
        high: see `low`.
        target: what it should not exceed, None if nothing was set.
        least: what it should not fall below, likewise.
    """

    measure: str
    dtype: str
    unit: str
    median: float
    low: float
    high: float
    target: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is; None without one."""
        return None if self.target is None else (self.least or 0) <= self.median <= self.target


def row_of(
    measure: str,
    values: Sequence[float],
    dtype: str = "",
    unit: str = "times",
    target: float | None = None,
    least: float | None = None,
) -> Row:
    """The row of one value a turn."""
    if len(values) == 1:
        return Row(measure, dtype, unit, values[0], values[0], values[0], target, least)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Row(measure, dtype, unit, middle, low, high, target, least)


def on(setting: Setting, cpu: float | None, cuda: float | None) -> float | None:
    """The target of a device."""
    return cuda if setting.device == "cuda" else cpu


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long a call takes, its work on a device included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(ways: Mapping[str, Callable[[], Any]], turns: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in each turn, after one call that does not count; every other turn in the other order.

    Whatever else a machine does then falls on all of them; a ratio is that of two times of one turn.
    """
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways) if turn % 2 else reversed(ways):
            found[name].append(seconds(ways[name], device))
    return found


def ratios(times: Mapping[str, Sequence[float]], one: str, other: str) -> list[float]:
    """Of two ways, turn by turn."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def slowness(dtype: str, device: str) -> float:
    """How many times as long as in float32 a product takes, 256 x 512 by 512 x 512."""
    left, right = torch.randn(256, 512, device=device), torch.randn(512, 512, device=device)
    small = (left.to(getattr(torch, dtype)), right.to(getattr(torch, dtype)))
    times = in_turns({dtype: lambda: small[0] @ small[1], "float32": lambda: left @ right}, 5, device)
    return statistics.median(ratios(times, dtype, "float32"))


def random_model(size: Size, dtype: str, device: str, blocks: int | None = None) -> LlamaForCausalLM:
    """A Llama of random weights, made on its device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=blocks or size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(size.length, 2048),
        tie_word_embeddings=False,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_windows(size: Size) -> torch.Tensor:
    """Token ids, windows x length."""
    return torch.randint(size.vocabulary, (size.windows, size.length), generator=torch.Generator().manual_seed(1))


def whole_rank(kept: float, m: int, n: int) -> int:
    """The largest multiple of 8 whose pair has at most that share of a matrix's weights, 1 at least."""
    rank = int(kept * m * n / (m + n))
    return max(1, rank // 8 * 8 or rank)


def random_basis(m: int, n: int, held: int) -> PrincipalBasis:
    """Of `held` directions, as large as weights; losses fall with the rank."""
    losses = torch.linspace(2, 1, held)
    up, down = torch.randn(m, held) / held**0.5, torch.randn(held, n) * SPREAD
    return PrincipalBasis(up, down, None, None, torch.ones(min(m, n)), losses)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Exchange a module."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
