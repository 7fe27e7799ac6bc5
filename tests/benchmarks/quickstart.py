"""Time and memory of the quickstart, cold and when nothing is left to do: `make benchmark`.

It runs in a temporary folder, downloads included, and prints the lines of "Whole studies on two cores" in
docs/performance.md.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
POLL = 0.5  # seconds


def run(arguments: list[str], folder: str, log: Path) -> tuple[float, float]:
    """Wall seconds, and peak memory in GiB of the process with all its children (proportional set size)."""
    started, peak = time.monotonic(), 0
    with log.open("w") as stream:
        process = psutil.Popen(arguments, cwd=folder, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(memory(member) for member in [process, *process.children(recursive=True)]))
            time.sleep(POLL)
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - started, peak / 2**30


def memory(process: psutil.Process) -> int:
    """Proportional set size, 0 if the process has just ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def main() -> None:
    """Run the quickstart twice and print what it took."""
    study = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--configfile", str(ROOT / "config/quickstart.yaml"), "--profile", str(ROOT / "profiles/local")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        cold, peak = run(study, folder, Path(folder) / "cold.log")
        again, _ = run(study, folder, Path(folder) / "again.log")
    table = [sys.executable, "-c", "import lowrank.paper.tables"]
    os.environ["PYTHONPATH"] = str(ROOT / "workflow_scripts")
    started = time.monotonic()
    subprocess.run(table, check=True)
    light = time.monotonic() - started
    print(f"machine: {os.cpu_count()} cores ({platform.machine()}), {psutil.virtual_memory().total / 2**30:.0f} GiB")
    print(f"quickstart, cold: {cold / 60:.1f} min, peak {peak:.1f} GiB")
    print(f"quickstart, nothing to be done: {again:.1f} s")
    print(f"start-up of a stage without torch: {light:.1f} s")


if __name__ == "__main__":
    main()
