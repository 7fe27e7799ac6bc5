"""`make compress` from the command to the checkpoint, on a tiny model, through the real rules."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank.config.load import load_study
from lowrank.export.numbers import measured
from lowrank.layout import Layout
from lowrank.manifest import manifest_of
from lowrank.model.checkpoint import load_checkpoint
from tests import tiny, tiny_study
from tests.warm import ENVIRONMENT, REPOSITORY, Warm

sys.path.insert(0, str(REPOSITORY / "workflow_scripts"))
import compress


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a config, and two texts."""
    folder = tmp_path_factory.mktemp("own model")
    trained = tiny.tokenizer()
    tiny.model("llama-gqa", len(trained)).save_pretrained(folder / "model")
    trained.save_pretrained(folder / "model")
    (folder / "calibration.txt").write_text(" ".join(tiny.text(seed, 300) for seed in range(12)))
    tiny_study.write_lines(folder / "test.jsonl", [{"text": tiny.text(500 + seed, 300)} for seed in range(6)])
    return folder


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    texts = ("--calibration", str(inputs / "calibration.txt"), "--test", str(inputs / "test.jsonl"))
    return ["--out", str(out), *texts, *more, "--", str(inputs / "model"), "20"]


def test_too_small_a_disk_is_told_before_anything_runs(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = 2 * 10**6
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    for named in (True, False):
        assert compress.main(command(inputs, tmp_path / "out"), lambda arguments: 3) == 3
        assert ("GiB are free there; the run may stop on the way" in capsys.readouterr().err) == named
        free = 10**12
    free = 2 * 10**6
    report = tmp_path / "out" / Layout(load_study(tmp_path / "out/study.yaml")).run / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("finished")
    assert compress.main(command(inputs, tmp_path / "out"), lambda arguments: 3) == 3
    assert "GiB" not in capsys.readouterr().err


def test_a_folder_becomes_a_checkpoint_and_a_table(
    inputs: Path, warm: Warm, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def run(arguments: Sequence[str]) -> int:
        done = warm.run(arguments, os.environ | ENVIRONMENT)
        runs.append(done.stdout)
        return done.returncode

    out = inputs / "out [old]"
    assert compress.main(command(inputs, out), run) == 0, runs
    said = capsys.readouterr().out
    places = dict(line.split(maxsplit=1) for line in said.splitlines() if line.startswith(("checkpoint:", "config:")))
    assert places["config:"] == str(out / "study.yaml")
    assert len((out / "study.yaml").read_text().splitlines()) < 15
    assert places["checkpoint:"] == str(out / "checkpoint")
    assert manifest_of(out / "checkpoint") == out / "results/model/compressed/model/rankwise/20/seed0/manifest.json"
    assert "perplexity, test" in measured(out / "checkpoint")
    assert not os.readlink(out / "checkpoint").startswith("/"), "OUT may be moved as a whole"
    assert (out / "report.html").samefile(out / "results/model/report.html")
    model = load_checkpoint(places["checkpoint:"], torch.float32)
    dense = tiny.model("llama-gqa", len(tiny.tokenizer()))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    assert load_study(out / "study.yaml").tables
    lines = {line[:24].strip(): line[24:].split("  ") for line in said.splitlines()}
    for method, ratio, column in (("dense", 0, 0), ("rankwise", 20, 1)):
        folder = out / f"results/model/evaluation/model/{method}/{ratio}/none/seed0"
        found = json.loads((folder / "perplexity.json").read_text())["corpora"]["test"]
        cost = json.loads((folder / "cost.json").read_text())
        values = [value.strip() for value in lines["perplexity (test)"] if value.strip()]
        assert float(values[column].split(" ±")[0]) == pytest.approx(found["perplexity"], abs=0.06)
        assert f"{cost['measured']['decode_tokens_per_second']:,.1f}" in "".join(lines["generation, tokens/s"])
        removed = [value.strip() for value in lines["linear weights removed"] if value.strip()]
        assert float(removed[column].removesuffix(" %")) == pytest.approx(ratio, abs=1)
    assert f"test:       {inputs / 'test.jsonl'}\n" in said
    log = (out / "results/model/logs/compress_model/model/rankwise/20/seed0.log").read_text()
    assert f", {min(8, len(os.sched_getaffinity(0)))} threads, torch" in log
    assert not (out / compress.RUNNING).exists()
    assert (out / "results/model/report.html").is_file()
    assert compress.main(command(inputs, out), run) == 0
    assert "Nothing to be done" in runs[1]


def test_what_stops_says_how_to_go_on(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress.main(command(inputs, tmp_path / "out"), lambda arguments: 3) == 3
    said = capsys.readouterr().err
    assert "The same command goes on from here" in said
    assert f"--directory {tmp_path / 'out'} --profile profiles/local --unlock" in said
    assert said.startswith(f"compressing {inputs / 'model'} by rankwise, 20 %, in {tmp_path / 'out'}\n")
    assert compress.main(command(inputs, tmp_path / "other", "--method", "svdd")) == 1
    assert "METHOD: 'svdd' is no method - did you mean 'svd'?" in capsys.readouterr().err


def test_beside_a_run_that_goes_on_no_other_starts_and_nothing_is_unlocked(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor where the command itself is gone, and Snakemake, which it has started, is not."""
    out = tmp_path / "out"

    def again(arguments: Sequence[str]) -> int:
        return compress.main(command(inputs, out), lambda arguments: pytest.fail("a second run"))

    assert compress.main(command(inputs, out), again) == 1
    said = capsys.readouterr().err
    assert f"OUT: a run goes on in {out}, process {os.getpid()} since " in said
    assert f"make status RUN={out}" in said
    orphan: list[subprocess.Popen[bytes]] = []

    def leave(arguments: Sequence[str]) -> int:
        orphan.append(subprocess.Popen(["sleep", "60"], close_fds=False))
        return 3

    assert compress.main(command(inputs, out), leave) == 3
    assert compress.main(command(inputs, out), lambda arguments: pytest.fail("a second run")) == 1
    assert "a run goes on in" in capsys.readouterr().err
    orphan[0].kill()
    orphan[0].wait()
    assert compress.main(command(inputs, out), lambda arguments: 4) == 4
    assert not (out / compress.RUNNING).exists()


def test_where_no_link_can_be_the_result_itself_is_named(inputs: Path, tmp_path: Path) -> None:
    wish = compress.Wish(str(inputs / "model"), "20", out=str(tmp_path / "out"))
    own = compress.own_study(wish, tmp_path / "cache")
    result = tmp_path / "out/results/report.html"
    result.parent.mkdir(parents=True)
    result.touch()
    (tmp_path / "out/report.html").write_text("somebody else's")
    assert compress.linked(own, result) == result
    assert (tmp_path / "out/report.html").read_text() == "somebody else's"


def test_a_lock_that_another_run_has_taken_away_is_not_held(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the file and its lock, the run that held it ends, and a new one may make it anew."""
    out, lock, taken = tmp_path / "out", fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            taken.append((out / compress.RUNNING).unlink())
        lock(descriptor, operation)

    def run(arguments: Sequence[str]) -> int:
        with (out / compress.RUNNING).open() as file, pytest.raises(BlockingIOError):
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 5

    monkeypatch.setattr(fcntl, "flock", late)
    assert compress.main(command(inputs, out), run) == 5


def test_a_text_that_was_seen_is_not_gone_on_with(
    inputs: Path, warm: Warm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy under another name is found when the texts are compared; then it is said what to change."""
    copy, out = tmp_path / "copy.txt", tmp_path / "out"
    copy.write_bytes((inputs / "calibration.txt").read_bytes())
    given = command(inputs, out)
    given[given.index("--test") + 1] = str(copy)
    compared = "results/model/compared_texts.json"
    assert compress.main(given, lambda arguments: warm.run([*arguments, compared], os.environ | ENVIRONMENT).returncode)
    said = capsys.readouterr().err
    assert "the same command would stop again" in said
    assert f"Give another file as TEST or CALIBRATION, with another OUT, or after deleting {out}." in said
    assert "goes on from here" not in said
    assert compress.main(given, lambda arguments: 3) == 3
    assert "The same command goes on from here" in capsys.readouterr().err, "another reason, later"


def test_texts_that_could_not_be_compared_are_not_called_seen(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(arguments: Sequence[str]) -> int:
        log = out / compress.Layout(load_study(out / "study.yaml")).log("compare_texts", {})
        log.parent.mkdir(parents=True)
        log.write_text("12:00:00 ERROR compare_texts: no space left on the disk\n")
        return 1

    assert compress.main(command(inputs, out), run) == 1
    said = capsys.readouterr().err
    assert "The same command goes on from here" in said
    assert "would stop again" not in said


def test_an_out_that_cannot_be_made_is_named(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert compress.main(command(inputs, tmp_path / "file/out"), lambda arguments: pytest.fail("a run")) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}/file/out/study.yaml: writing failed: ")


SLOW_TO_END = """
import signal, sys, time
from pathlib import Path

def end(*_):
    time.sleep(1)
    Path("ended").touch()
    sys.exit(7)

signal.signal(signal.SIGINT, end)
Path("begun").touch()
time.sleep(60)
"""


def test_ctrl_c_waits_for_snakemake_to_end_its_jobs(tmp_path: Path) -> None:
    (tmp_path / "workflow_scripts").mkdir()
    (tmp_path / "workflow_scripts/run.py").write_text(SLOW_TO_END)
    code = (
        "import pathlib, signal, sys, compress; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"compress.REPOSITORY = pathlib.Path({str(tmp_path)!r}); sys.exit(compress.snakemake([]))"
    )
    scripts = REPOSITORY / "workflow_scripts"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=scripts, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 7
    assert (tmp_path / "ended").exists()


def test_what_is_not_used_is_said_at_the_start(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress.main(command(inputs, tmp_path / "out", "--method", "svd"), lambda arguments: 3)
    assert "\nsvd reads no calibration text: CALIBRATION is not used\n" in capsys.readouterr().err


def test_a_variable_that_make_compress_does_not_know_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKE_WAS_GIVEN", "s --no-print-directory -- TEST=a\\ b=c.txt MODEL=it's\\ mine METHODS=svd")
    assert compress.main(command(inputs, tmp_path / "out"), lambda arguments: pytest.fail("a run")) == 1
    said = capsys.readouterr().err
    assert said.startswith("METHODS: no option of `make compress`; there are MODEL,")
    assert "did you mean 'METHOD'?" in said
    assert not (tmp_path / "out").exists()


def test_make_hands_on_what_is_typed_and_nothing_of_the_environment(tmp_path: Path) -> None:
    """The recipe as make would run it: a variable of the environment is no option."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    (tmp_path / ".installed").touch()
    typed = ["MODEL=/data/it's mine", "RATIO=20", "METHOD=svd", "TEST=a b.txt", f"VENV={tmp_path}"]
    made = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--old-file", f"{tmp_path}/.installed", "compress", *typed],
        cwd=REPOSITORY,
        env=outside | {"OUT": "/elsewhere", "DTYPE": "float16"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = subprocess.run(
        ["bash", "-c", made.stdout.replace("python workflow_scripts/compress.py", "printf '%s\\n'")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert given.stdout.splitlines() == ["--method=svd", "--test=a b.txt", "--", "/data/it's mine", "20"]
