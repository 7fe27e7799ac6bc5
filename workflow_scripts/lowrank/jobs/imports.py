"""Torch and the classes of models: thousands of modules, which a job loads before it can begin."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NEED_MODELS = (
    *("fetch_model", "collect_statistics", "collect_gradients", "compute_bases", "eliminate_neurons"),
    *("select_validation", "search_allocation", "measure_sensitivity", "measure_truncations"),
    *("compress_model", "post_train", "distil_features"),
    *("evaluate_perplexity", "evaluate_zero_shot", "evaluate_cost", "evaluate_generation"),
)
"""Rules whose stages load the classes of models."""


def load_models(rule: str) -> None:
    """Load the classes of models for a stage that will need them, unless they are there."""
    if rule in NEED_MODELS and "transformers.modeling_utils" not in sys.modules:
        with uncollected():
            import lowrank.model.checkpoint  # noqa: F401


@contextmanager
def uncollected() -> Iterator[None]:
    """Load modules while Python's collector of garbage waits.

    It would look again and again through all that has been loaded so far, of which hardly anything is garbage: a
    quarter of the whole time (docs/performance.md). Afterwards it leaves these objects alone.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
