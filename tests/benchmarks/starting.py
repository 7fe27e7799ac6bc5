"""From the start of a job's Python to its first computing: imports of a stage, a small checkpoint, one forward pass.

Each by itself, and as a fork of the server that runs have where forks are safe.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lowrank.jobs.forkserver import FORKED, SERVER, forks_are_safe
from lowrank.jobs.stage import serve_forks
from tests import tiny
from tests.benchmarks.measuring import Row, Setting, on, row_of

SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"
STAGES = ("make_table", "evaluate_perplexity", "collect_statistics", "search_allocation", "evaluate_zero_shot")
"""The last imports most."""
TURNS = 2
HAND_OVER = """
from lowrank.jobs.forkserver import end_as, run_as_fork
if (status := run_as_fork({rule!r})) is not None:
    end_as(status)
"""
WITHOUT_MODEL = {"make_table"}
COMPUTE = """
import torch
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.losses import last_hidden
from lowrank.model.runtime import pick_device
device = pick_device()
model, ids = load_checkpoint({folder!r}, torch.float32, device), torch.zeros(1, 4, dtype=torch.long, device=device)
last_hidden(model, ids).sum().item()
"""


def rows(setting: Setting) -> list[Row]:
    """Seconds of each kind of stage, an interpreter of its own each time."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        tiny.model("llama").save_pretrained(folder)
        scripts = {stage: program(stage, folder) for stage in STAGES}
        seconds_of(scripts[STAGES[-1]])  # files come from the disk once
        for stage, script in scripts.items():
            times = [seconds_of(script) for _ in range(TURNS)]
            found.append(row_of(f"start of {stage} to its first computing", times, "", "s", on(setting, 3.0, 6.0)))
        if forks_are_safe():
            found += forks(setting, Path(folder), scripts)
    return found


def forks(setting: Setting, folder: Path, scripts: dict[str, str]) -> list[Row]:
    """The same of forks; of the first one of a kind, for which the server loads modules, nothing is told."""
    found = []
    os.environ["PYTHONPATH"] = str(SCRIPTS)
    serve_forks()
    try:
        for stage in filter(FORKED.__contains__, scripts):
            file = folder / f"{stage}.py"
            file.write_text(HAND_OVER.format(rule=stage) + scripts[stage], encoding="utf-8")
            times = [seconds_of(str(file)) for _ in range(1 + TURNS)][1:]
            name = f"start of {stage} as a fork to its first computing"
            found.append(row_of(name, times, "", "s", on(setting, 3.0, 6.0)))
    finally:
        os.environ.pop(SERVER)
    return found


def program(stage: str, folder: str) -> str:
    """What a stage loads, at its top, for its rule and in its functions; then a forward pass, if it has a model."""
    tree = ast.parse((SCRIPTS / "stages" / f"{stage}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    top, inner = ([ast.unparse(node) for node in imports if (node in tree.body) == first] for first in (True, False))
    models = f"from lowrank.jobs.imports import load_models\nload_models({stage!r})"
    return "\n".join([*top, models, *inner, "" if stage in WITHOUT_MODEL else COMPUTE.format(folder=folder)])


def seconds_of(script: str) -> float:
    """From the start of a Python, with a text or a file, to its end.

    Raises:
        CalledProcessError: the script fails.
    """
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    started = time.perf_counter()
    command = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-c", script]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return time.perf_counter() - started
