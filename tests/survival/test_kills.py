"""Killed twenty times at random, in a folder with a strange name and behind a link: the same tables, byte by byte."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.survival import small
from tests.survival.workshop import flip, snapshot
from tests.warm import Warm

KILLS = 20
STEPS = ("statistics", "bases", "allocation", "compressed", "tuned", "evaluation", "tables")
TRIALS = "tiny/bolaco/20/seed0/trials.csv"
SECRET = "hf_" + "notARealTokenButNobodyMaySeeIt0"
ODD = "größe 名 ; touch x & $(touch y) `touch z`"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody kills, and how long it took, in seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    small.write_study(folder)
    warm.run(small.arguments(folder, "--dry-run"), small.environment())  # so that all is loaded
    started = time.monotonic()
    small.succeeded(warm.run(small.arguments(folder), small.environment()))
    return folder, time.monotonic() - started


@pytest.fixture(scope="module")
def killed(warm: Warm, undisturbed: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study after twenty kills, elsewhere, with a token in the environment and results on another disk."""
    folder = tmp_path_factory.mktemp("killed") / ODD
    small.write_study(folder)
    disk = tmp_path_factory.mktemp("disk")
    (folder / "results").symlink_to(disk, target_is_directory=True)
    draw = random.Random(0)
    kills = 0
    for _ in range(3 * KILLS):
        if kills == KILLS:
            break
        end = time.monotonic() + draw.uniform(0.04, 0.2) * undisturbed[1]
        run = warm.kill(small.arguments(folder), small.environment(HF_TOKEN=SECRET), lambda: time.monotonic() > end)  # noqa: B023
        if run.returncode == -signal.SIGKILL:
            kills += 1
            if kills == 1:
                small.succeeded(warm.run(small.arguments(folder, "--unlock"), small.environment()))
            else:  # what that does, without reading the whole study for it
                shutil.rmtree(folder / ".snakemake/locks", ignore_errors=True)
        else:  # everything was finished before: make some of it again, with all that follows
            small.succeeded(run)
            for lost in STEPS[draw.randrange(len(STEPS)) :]:
                shutil.rmtree(folder / small.RUN / lost)
    assert kills == KILLS
    small.succeeded(warm.run(small.arguments(folder), small.environment(HF_TOKEN=SECRET)))
    return folder


def test_the_tables_are_those_of_an_undisturbed_run(undisturbed: tuple[Path, float], killed: Path) -> None:
    expected = small.tables(undisturbed[0])
    assert {name.partition(".")[0] for name in expected} == {"table_1", "table_7", "table_8"}
    assert len(expected) == 12
    assert small.tables(killed) == expected


def test_so_are_the_weights_and_the_trials(undisturbed: tuple[Path, float], killed: Path) -> None:
    expected = small.weights(undisturbed[0])
    assert len(expected) == 2
    assert small.weights(killed) == expected
    trials = f"{small.RUN}/allocation/{TRIALS}"
    assert (killed / trials).read_bytes() == (undisturbed[0] / trials).read_bytes()


def test_damage_is_told_and_mended(undisturbed: tuple[Path, float], warm: Warm) -> None:
    """Through Snakemake: one flipped bit stops the job that reads it, and what is made again is what was there."""
    folder, _ = undisturbed
    bases = folder / small.RUN / "bases/tiny/c/pooled/layers"
    before, expected = snapshot(folder / small.RUN / "statistics"), small.tables(folder)
    flip(bases / "layer_001.safetensors", -3)
    again = small.arguments(folder, f"{small.RUN}/allocation/{TRIALS}", "--forcerun", "search_allocation")
    failed = warm.run(again, small.environment())
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1
    assert "layer_001.safetensors: damaged or replaced: not the file that " in said
    assert f"{bases.relative_to(folder).with_name('manifest.json')} describes. " in said
    assert "Delete the folder results/small/bases/tiny/c/pooled/layers and run the workflow again." in said
    assert "Traceback" not in said
    shutil.rmtree(bases)
    small.succeeded(warm.run(small.arguments(folder), small.environment()))
    assert small.tables(folder) == expected
    assert snapshot(folder / small.RUN / "statistics") == before


def test_how_results_were_made_that_no_head_has_noted(undisturbed: tuple[Path, float], warm: Warm) -> None:
    """As jobs leave them whose head was killed: Snakemake's head notes settings, and a job only that it is finished."""
    folder, _ = undisturbed
    notes, config, tables = folder / ".snakemake/metadata", folder / "small.yaml", folder / small.RUN / "tables"
    before, expected = config.read_text(), small.tables(folder)
    allocation = f"{small.RUN}/allocation/tiny/bolaco/20/seed0"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return warm.run(small.arguments(folder, *more), small.environment())

    def refused() -> str:
        shutil.rmtree(tables)
        found = run()
        assert found.returncode == 1
        return found.stdout.partition("Snakemake has no note of how these were made")[2]

    def made_again(evaluations: int) -> None:
        small.succeeded(run("--forcerun", f"{allocation}/allocation.json"))  # as the message says
        assert (folder / allocation / "trials.csv").read_text().count("\n") == 1 + evaluations

    shutil.rmtree(notes)
    shutil.rmtree(tables)
    small.succeeded(run())
    assert small.tables(folder) == expected
    config.write_text(before.replace("evaluations: 5", "evaluations: 6"))
    planned = small.succeeded(run("--dry-run", "--quiet", "host"))
    assert re.search(r"search_allocation +1\n", planned)
    assert not re.search(r"compute_bases +1\n", planned)

    shutil.copytree(notes, folder / "notes")
    shutil.rmtree(notes)
    said = refused()
    assert f"\n  {allocation}/allocation.json\n" in said
    assert "statistics" not in said
    made_again(6)

    shutil.rmtree(notes)
    (folder / "notes").rename(notes)  # a note of before is none of what was made later
    config.write_text(before)
    assert f"\n  {allocation}/allocation.json\n" in refused()
    made_again(5)
    assert small.tables(folder) == expected


def test_nothing_is_left_over(killed: Path, warm: Warm) -> None:
    assert (killed / "results").is_symlink()
    left = [path for path in (killed / small.RUN).rglob("*") if path.name.endswith(".tmp") or ".tmp" in path.name]
    assert not left
    assert not list((killed / small.RUN / ".state").glob("*"))
    (killed / "model/NOTES.md").write_text("Nothing that is fetched.")
    assert "Nothing to be done" in small.succeeded(warm.run(small.arguments(killed), small.environment()))


def test_no_name_went_through_a_shell(killed: Path) -> None:
    for folder in (killed, killed.parent, small.ROOT, killed / small.RUN):
        assert not {"x", "y", "z"} & {path.name for path in folder.iterdir()}


def test_the_token_is_in_no_file(killed: Path) -> None:
    files = [path for top in (killed, killed / "results") for path in top.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
