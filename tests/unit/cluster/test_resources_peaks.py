"""Memory that the stages' work takes on a random model, as the system counts it, beside the plan's estimate of it.

What the process, the libraries and the weights take is there before. `compute_bases` is not compared: its parts never
live together, so that its estimate is one from above. `make memory` compares whole jobs, on a real model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.cluster.resources import Estimator
from lowrank.config.load import check_study
from tests.unit.cluster import peaks

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
BEFORE = {"program", "libraries", "texts", "weights", "a pass's weights", "other weights"}
WILDCARDS = {"model": "one", "calibration": "c", "seed": "0", "tuning": "none", "suite": "held-out"}
JOBS = {
    "collect_statistics": WILDCARDS,
    "collect_gradients": WILDCARDS,
    "evaluate_perplexity": WILDCARDS | {"method": "dense", "ratio": "0"},
    "search_allocation": WILDCARDS | {"method": "bolaco", "ratio": "20"},
}


def estimates() -> dict[str, float]:
    """Rule -> bytes on top of what is there before."""
    text = {"source": {"path": "text.jsonl"}, "format": "jsonl"}
    bases = {"calibration": "c", "covariance": "naive"}
    windows = {"corpora": ["text"], "length": peaks.LENGTH}
    study = check_study(
        {
            "run": "peaks",
            "models": {
                "one": {"source": {"path": "one"}, "shape": peaks.SHAPE, "dtype": "float32", "max_length": 2048}
            },
            "corpora": {"text": text, "test": text | {"source": {"path": "test.jsonl"}}},
            "calibration": {"c": windows | {"windows": peaks.WINDOWS}},
            "covariance": {"naive": {"estimator": "naive"}},
            "validation": {"v": windows | {"windows": 2, "select": bases | {"keep": 2}}},
            "search": {"s": {"evaluations": 3, "initial": 2}},
            "methods": {
                "dense": {"kind": "dense"},
                "bolaco": bases | {"kind": "bolaco", "validation": "v", "search": "s"},
            },
            "suites": {"held-out": {"kind": "perplexity", "corpora": ["test"], "length": peaks.LENGTH}},
        }
    )
    held = dict.fromkeys(("collect_statistics", "collect_gradients"), peaks.LAYERS_PER_PASS)
    needs = {rule: Estimator(study, **held).need(rule, wildcards) for rule, wildcards in JOBS.items()}
    return {
        rule: sum(size for part, size in {**need.device, **need.host}.items() if part not in BEFORE)
        for rule, need in needs.items()
    }


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="an earlier peak of resident memory is forgotten by /proc/self/clear_refs, which is not to be had here",
)
def test_measured_peaks_are_within_a_quarter_of_the_estimates(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(str(HERE.parents[2] / name) for name in ("workflow_scripts", "."))
    run = subprocess.run(
        [sys.executable, str(HERE / "peaks.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("PEAKS ")]
    measured, expected = json.loads(line.removeprefix("PEAKS ")), estimates()
    assert measured.keys() == expected.keys()
    ratios = {rule: round(expected[rule] / peak, 2) for rule, peak in measured.items()}
    assert min(measured.values()) > 30e6  # enough to be seen
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios.values()), ratios
