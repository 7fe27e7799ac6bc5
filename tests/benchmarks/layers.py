"""Forward passes of blocks whose linear layers are dense, pairs, pairs with identity blocks, or slices of a basis.

Run as `python -m tests.benchmarks.layers [result.json]`. All kinds of layers have the same random weights, stand in one
process and take turns, so that whatever else a machine does falls on all of them; a ratio is that of two passes of one
turn. "As before" are two layers that this file keeps to compare with: an identity block that joins its outputs and then
gathers them by an expanded index (the order itself is kept, as today), and slices of the columns of an m x k matrix.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear
from lowrank.search.sliced_model import SlicedLinear
from tests.benchmarks.measuring import Row, Setting, in_turns, on, random_basis, ratios, row_of, whole_rank

KEPT = 0.8
"""Share of each matrix's weights that the low-rank layers have."""


@dataclass(frozen=True)
class Case:
    """What is measured: blocks of a Llama's widths, in evaluation, one sequence.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        blocks: how many.
        tokens: of a pass: hundreds for a prompt, 1 for a step of decoding.
        dtype: of weights and activations.
        device: "cpu" or "cuda".
        passes: of each kind in one turn.
        turns: how often the kinds take turns.
        kept: share of each matrix's weights that the low-rank layers have.
    """

    hidden: int
    intermediate: int
    blocks: int
    tokens: int
    dtype: str
    device: str
    passes: int
    turns: int
    kept: float = KEPT


def cases(device: str) -> list[Case]:
    """7B widths where there is a GPU, a fraction of them on a CPU."""
    hidden, intermediate, blocks = (4096, 11008, 8) if device == "cuda" else (1024, 2752, 2)
    found = []
    for dtype in ("float32", "bfloat16"):
        for tokens, passes, turns in ((512, 1, 5), (1, 5, 15)):
            passes = 10 if device == "cuda" else passes
            found.append(Case(hidden, intermediate, blocks, tokens, dtype, device, passes, turns))
    return found


class IdentityBlockBefore(IdentityBlockLinear):
    """One tensor of both results, and a gather of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        z = self.down(x)
        y = torch.cat([z, self.rest(z)], dim=-1)
        return y.gather(-1, self.places().expand(y.shape))


class SlicedBefore(nn.Module):
    """Columns of an m x k matrix."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.up, self.down, self.rank = up, down, rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        return functional.linear(functional.linear(x, self.down[: self.rank]), self.up[:, : self.rank])


Maker = Callable[[nn.Linear], nn.Module]


def pair(kept: float) -> Maker:
    """Factors of their own."""

    def make(dense: nn.Linear) -> nn.Module:
        m, n = dense.weight.shape
        return LowRankLinear(n, m, whole_rank(kept, m, n), bias=False)

    return make


def identity_block(kept: float, kind: type[IdentityBlockLinear] = IdentityBlockLinear) -> Maker:
    """As many weights as a pair, so a higher rank; the rows are random."""

    def make(dense: nn.Linear) -> nn.Module:
        m, n = dense.weight.shape
        rank = next(r for r in range(8, min(m, n) + 8, 8) if (r + 8) * (m + n - r - 8) > kept * m * n or r + 8 > m)
        layer = kind(n, m, rank, bias=False)
        layer.rows.copy_(torch.randperm(m)[:rank].sort().values)
        return layer

    return make


def sliced(kept: float, before: bool = False) -> Maker:
    """A slice of a basis that holds one direction less than the break-even rank, as bases do."""

    def make(dense: nn.Linear) -> nn.Module:
        m, n = dense.weight.shape
        k, rank = (m * n - 1) // (m + n), whole_rank(kept, m, n)
        basis = random_basis(m, n, k)
        if before:
            return SlicedBefore(basis.directions.to(dense.weight), basis.projection.to(dense.weight), rank)
        layer = SlicedLinear(dense, basis)
        layer.set_rank(rank)
        return layer

    return make


def kinds(kept: float) -> Mapping[str, Maker]:
    """All kinds of layers, with that share of the weights."""
    return {
        "dense": lambda dense: dense,
        "pairs": pair(kept),
        "identity blocks, as before": identity_block(kept, IdentityBlockBefore),
        "identity blocks": identity_block(kept),
        "slices, as before": sliced(kept, before=True),
        "slices": sliced(kept),
    }


COMPARED = {
    "pairs / dense": ("pairs", "dense"),
    "identity blocks / dense": ("identity blocks", "dense"),
    "identity blocks / as before": ("identity blocks", "identity blocks, as before"),
    "slices / pairs": ("slices", "pairs"),
    "slices / as before": ("slices", "slices, as before"),
}


class Blocks(nn.Module):
    """The linear layers of some blocks, with what joins them but for the attention itself, which no kind changes."""

    def __init__(self, case: Case, make: Maker) -> None:
        super().__init__()
        h, i = case.hidden, case.intermediate
        shapes = {"q": (h, h), "k": (h, h), "v": (h, h), "o": (h, h), "gate": (h, i), "up": (h, i), "down": (i, h)}
        like: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "device": case.device}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: make(nn.Linear(*widths, bias=False, **like)).to(**like) for name, widths in shapes.items()}
            )
            for _ in range(case.blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (1, tokens, hidden) to the same shape."""
        for block in self.blocks:
            x = x + block["o"](block["q"](x) + block["k"](x) + block["v"](x))
            x = x + block["down"](functional.silu(block["gate"](x)) * block["up"](x))
        return x


def measure(case: Case) -> dict[str, Any]:
    """Seconds a pass of every kind, turn by turn, and the ratios of `COMPARED`.

    Returns:
        "case"; "seconds": kind -> median; "ratios": name -> one a turn.
    """
    torch.manual_seed(0)
    models = {name: Blocks(case, make).eval().requires_grad_(False) for name, make in kinds(case.kept).items()}
    x = torch.randn(1, case.tokens, case.hidden).to(getattr(torch, case.dtype)).to(case.device)

    def passes(model: nn.Module) -> None:
        for _ in range(case.passes):
            model(x)

    with torch.inference_mode():
        ways = {name: lambda model=model: passes(model) for name, model in models.items()}
        times = in_turns(ways, case.turns, case.device)
    return {
        "case": asdict(case),
        "seconds": {name: statistics.median(values) / case.passes for name, values in times.items()},
        "ratios": {name: ratios(times, one, other) for name, (one, other) in COMPARED.items()},
    }


TARGETS = {  # on a GPU, prompts: (20 %, 30 %); elsewhere 1, wherever the arithmetic is less
    "pairs / dense": (0.90, 0.80),
    "identity blocks / dense": (0.95, 0.87),
    "slices / pairs": (None, None),
}


def rows(setting: Setting) -> list[Row]:
    """Prompts with 20 and 30 % removed, and single tokens with 20 %, for each dtype."""
    size, found = setting.size, []
    blocks, passes = size.layers
    for dtype in setting.dtypes:
        for at, (kept, tokens) in enumerate(((0.8, size.length), (0.7, size.length), (0.8, 1))):
            repeated = 1 if setting.device == "cpu" and tokens > 1 else passes
            case = Case(
                size.hidden, size.intermediate, blocks, tokens, dtype, setting.device, repeated, size.turns, kept
            )
            values = measure(case)["ratios"]
            for name, on_gpu in TARGETS.items():
                target = None if on_gpu[0] is None else on(setting, 1.0, on_gpu[at] if tokens > 1 else None)
                what = f"layers, {tokens} token{'s' if tokens > 1 else ''}, {1 - kept:.0%} removed: {name}"
                found.append(row_of(what, values[name], dtype, target=target))
    return found


def results() -> dict[str, Any]:
    """Everything, on the GPU if there is one: "machine", "torch", "threads", "kept" and "measured", a list."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "machine": machine,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kept": KEPT,
        "measured": [measure(case) for case in cases(device)],
    }


def table(found: Mapping[str, Any]) -> str:
    """The results in Markdown: milliseconds of a dense pass, and ratios with the middle half of the turns."""
    lines = [
        f"{found['machine']}, torch {found['torch']}, {found['threads']} threads, {KEPT:.0%} of the weights kept",
        "",
        f"| tokens | dtype | dense, ms | {' | '.join(COMPARED)} |",
        "|---" * (3 + len(COMPARED)) + "|",
    ]
    for one in found["measured"]:
        case = one["case"]
        shown = (row_of("", values) for values in one["ratios"].values())
        cells = (f"{row.median:.2f} ({row.low:.2f} to {row.high:.2f})" for row in shown)
        dense = f"{one['seconds']['dense'] * 1000:.2f}"
        lines.append(f"| {case['tokens']} | {case['dtype']} | {dense} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    measured = results()
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "layers.json")
    target.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(table(measured))
