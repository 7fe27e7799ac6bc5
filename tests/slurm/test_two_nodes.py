"""A job on both nodes of the cluster: SLURM's own `srun` starts the processes of each, by both launchers.

The nodes are one machine, so that no network lies between them; all else is as on a real cluster.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from post_training_samples import a_job, save_tiny_model
from slurm_cluster import CPU_NODE, GPU_NODE, Cluster

from lowrank.crew import Crew
from lowrank.post_training.job import Progress
from lowrank.post_training.launch import launch

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / name) for name in ("workflow_scripts", "tests/unit")]
SCRIPT = """#!{python}
import json, logging, os, sys
from pathlib import Path

sys.path[:0] = {paths!r}
os.environ["PYTHONPATH"] = os.pathsep.join({paths!r})
os.environ["CUDA_VISIBLE_DEVICES"] = ""
kept = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_SUBMIT_DIR")
for name in list(os.environ):  # what Snakemake's job step leaves of them
    if name.startswith(("SLURM_", "SRUN_", "SBATCH_")) and name not in kept:
        del os.environ[name]
logging.basicConfig(level=logging.INFO)
import crew_work
from lowrank.crew import Crew
from lowrank.launcher import run_shared
from lowrank.post_training.job import TrainingJob
from lowrank.post_training.launch import launch

folder = Path({folder!r})
sums = [run_shared(crew_work.add_ranks, {{}}, Crew(1, 2, name), 1, folder / name) for name in ("torchrun", "deepspeed")]
launch(TrainingJob(**json.loads({job!r})), Crew(1, 2), 1)
(folder / "sums.json").write_text(json.dumps(sums))
"""


def test_two_nodes_work_on_one_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    checkpoint = save_tiny_model(tmp_path / "model")
    alone, shared = (a_job(checkpoint, tmp_path / name, micro_batch_size=2, steps=3) for name in ("alone", "shared"))
    launch(alone, Crew(), 1)
    script = tmp_path / "job.py"
    job = json.dumps(vars(shared))
    script.write_text(SCRIPT.format(python=sys.executable, paths=PATHS, folder=str(tmp_path), job=job))
    cluster.order("scontrol", "create", "PartitionName=both", f"Nodes={CPU_NODE},{GPU_NODE}", "MaxTime=60")
    try:
        options = ["--partition=both", "--nodes=2", "--ntasks-per-node=2", "--mem=6000", "--time=20"]
        options.append(f"--output={tmp_path}/log")
        run = subprocess.run(
            ["sbatch", "--wait", *options, str(script)],
            env=cluster.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert run.returncode == 0, run.stdout + run.stderr + (tmp_path / "log").read_text()[-3000:]
    finally:
        cluster.ask("scontrol", "delete", "PartitionName=both")
    sums = json.loads((tmp_path / "sums.json").read_text())
    assert [found["total"] for found in sums] == [[1, 2, 2e-30]] * 2
    hosts = (tmp_path / "deepspeed/hostfile1").read_text()
    assert hosts == f"{CPU_NODE} slots=1\n{GPU_NODE} slots=1\n"
    one, two = (Progress.load(tmp_path / name) for name in ("alone", "shared"))
    for curve in ("loss", "validation"):
        assert dict(getattr(two, curve)) == pytest.approx(dict(getattr(one, curve)), rel=1e-5)
