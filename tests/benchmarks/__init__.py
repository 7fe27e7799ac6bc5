"""Benchmarks, each of which runs by itself (`python -m tests.benchmarks.layers`), or all in one run (`make bench`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow_scripts"))
