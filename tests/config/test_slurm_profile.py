"""The profile for SLURM as it lies in the repository, and what profiles/README.md says of it."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.config.wrong import REPOSITORY

PROFILE = (REPOSITORY / "profiles/slurm/profile.yaml").read_text()
README = (REPOSITORY / "profiles/README.md").read_text()
COMMENTED_ENTRY = re.compile(r"^(\s*)# ([a-z_-]+: )", re.MULTILINE)


def entries(profile: dict[str, Any]) -> set[str]:
    """Keys of a profile, and those of what it says of resources; not names of rules."""
    nested = ("resources", "default-resources")
    return set(profile) | {key for name in nested for key in profile.get(name, {})}


def explained() -> set[str]:
    """What the first column of the README's table of entries names."""
    table = README.partition("| entry | what it is for |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {word.strip() for cell in cells for text in re.findall(r"`([^`]+)`", cell) for word in text.split(":")}


def test_the_short_name_of_the_profile_is_a_link_that_git_holds() -> None:
    link = REPOSITORY / "slurm"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "profiles/slurm"
    if not (REPOSITORY / ".git").exists():
        pytest.skip("what git holds of the link is asked of git, and this folder is no checkout")
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--stage", "slurm"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[0] == "120000"


def test_each_entry_is_explained() -> None:
    profile = yaml.safe_load(COMMENTED_ENTRY.sub(r"\1\2", PROFILE))
    assert {"slurm_account", "slurm_partition", "slurm-partition-config"} <= entries(profile)
    assert entries(profile) - {"executor"} <= explained()


def test_what_the_profile_must_say_and_must_not_say() -> None:
    profile = yaml.safe_load(PROFILE)
    assert profile["executor"] == "slurm"
    assert profile["resources"]["gpu"] > 0
    assert profile["retries"] > 0
    assert profile["slurm-requeue"] is True
    # Job arrays and groups of several jobs: the plugin gives them wrong states, or one GPU for two.
    assert not {key for key in profile if "array" in key or "group" in key}
    # Nothing of a site.
    assert not {"slurm_account", "slurm_partition", "gpu_type"} & entries(profile)


def test_the_profile_of_a_site_in_the_readme_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    site = yaml.safe_load(block)
    assert entries(site) <= explained()
    assert set(site["default-resources"]) >= {"gpus_per_job", "slurm_account", "gpu_type"}
    partitions = yaml.safe_load((REPOSITORY / "profiles/slurm/partitions.example.yaml").read_text())["partitions"]
    assert all(isinstance(limits["max_runtime"], str) for limits in partitions.values())
    assert {name for name, limits in partitions.items() if limits.get("max_gpu")} == {"gpu"}
