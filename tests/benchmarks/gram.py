"""Sums of x'x by panels (`lowrank.calibration.gram`) beside whole products: `python -m tests.benchmarks.gram`.

Batches of as many rows as the passes take; both sides take turns.
"""

from __future__ import annotations

import torch

from lowrank.calibration.gram import add_gram
from tests.benchmarks.measuring import SIZES, Row, Setting, in_turns, ratios, row_of

TURNS_EACH = 3
"""Turns for each turn of other benchmarks: one takes milliseconds."""


def rows(setting: Setting) -> list[Row]:
    """Panels against the whole product, for each number of features."""
    count, widths = setting.size.grams
    found = []
    for features in widths:
        batch = torch.randn(count, features, generator=torch.Generator().manual_seed(0)).to(setting.device)
        total = torch.zeros(features, features, dtype=torch.float64, device=setting.device)
        ways = {
            "whole": lambda batch=batch, total=total: total.add_(batch.T @ batch),
            "panels": lambda batch=batch, total=total: add_gram(total, batch),
        }
        times = in_turns(ways, setting.size.turns * TURNS_EACH, setting.device)
        what = f"x'x of {count} x {features}: by panels / whole"
        found.append(row_of(what, ratios(times, "panels", "whole"), "float32", target=1.0))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in rows(Setting(SIZES["small"], "cpu", ("float32",))):
        print(f"{row.measure}: {row.median:.2f} ({row.low:.2f} to {row.high:.2f})")
