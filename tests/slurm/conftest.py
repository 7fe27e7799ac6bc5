"""The cluster and the undisturbed study, each made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.apt import Unavailable, install
from tests.slurm.slurm_cluster import PACKAGES, PROGRAMS, Cluster
from tests.slurm.slurm_study import Study


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that is stopped whatever happens; a skip with the reason where there can be none."""
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the SLURM plugin of Snakemake is not installed")
    if sys.platform != "linux":
        pytest.skip("SLURM runs on Linux only")
    try:
        install("SLURM", PROGRAMS, PACKAGES)
    except Unavailable as error:
        pytest.skip(str(error))
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="package")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, fork_server: str) -> Study:
    """The study, run from its beginning to its end without a fault."""
    study = Study.new(tmp_path_factory.mktemp("undisturbed"), cluster, fork_server)
    study.snakemake()
    study.first = study.jobs()
    return study
