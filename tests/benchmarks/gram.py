"""Sums of x'x by panels (`lowrank.calibration.gram`) beside whole products: `make benchmark`.

Batches of 512 rows, as the passes take them; the best of several tries of each side in turn, one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow_scripts"))

from lowrank.calibration.gram import add_gram

ROWS, TRIES = 512, 15


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(features: int) -> tuple[float, float]:
    """Best seconds of the whole product, and by panels."""
    rows = torch.randn(ROWS, features, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(features, features, dtype=torch.float64)
    pairs = [(seconds(lambda: total.add_(rows.T @ rows)), seconds(lambda: add_gram(total, rows))) for _ in range(TRIES)]
    whole, panels = zip(*pairs, strict=True)
    return min(whole), min(panels)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("features  whole product  by panels  ratio")
    for features in (576, 1536, 4096):
        whole, panels = compare(features)
        print(f"{features:8}  {whole * 1000:10.1f} ms  {panels * 1000:6.1f} ms  {panels / whole:5.2f}")
