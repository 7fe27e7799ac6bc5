"""SLURM's `srun` and `scontrol` for tests: every node of a job is this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SRUN = """#!{python}
import os, subprocess, sys, time
from pathlib import Path

options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(options):]
Path({log!r}).write_text("\\n".join(options))
nodes = int(next(word for word in options if word.startswith("--nodes=")).partition("=")[2])
listed = dict(SLURM_STEP_NODELIST=f"rankwise-[1-{{nodes}}].invalid", SLURM_NNODES=str(nodes))
running = [subprocess.Popen(command, env=os.environ | listed | dict(SLURM_NODEID=str(node))) for node in range(nodes)]
code = 0
while running:
    ended = [process for process in running if process.poll() is not None]
    code = code or next((process.returncode for process in ended if process.returncode), 0)
    running = [process for process in running if process not in ended]
    if code:  # --kill-on-bad-exit
        for process in running:
            process.terminate()
    time.sleep(0.05)
sys.exit(code)
"""
SCONTROL = """#!{python}
import re, sys

assert sys.argv[1:3] == ["show", "hostnames"]
before, first, last, after = re.fullmatch(r"(.*)\\[(\\d+)-(\\d+)\\](.*)", sys.argv[3]).groups()
print("\\n".join(f"{{before}}{{number}}{{after}}" for number in range(int(first), int(last) + 1)))
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put both programs first on the path. Returns the file in which `srun` notes its options, one a line."""
    folder.mkdir(parents=True)
    log = folder / "srun.options"
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        program = folder / name
        program.write_text(text.format(python=sys.executable, log=str(log)))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log
