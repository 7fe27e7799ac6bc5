"""`make bench` in miniature: what its file holds, not what it measures."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.jobs.forkserver import SERVER
from tests import tiny
from tests.benchmarks import __main__ as bench
from tests.benchmarks import decoding, starting
from tests.benchmarks.measuring import SIZES, Row, Setting, in_turns, row_of, whole_rank

TINY = Setting(SIZES["tiny"], "cpu", ("float32",))


def test_a_dtype_without_fast_products_is_left_out_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "slowness", lambda dtype, device: {"bfloat16": 20.0, "float16": 1.1}[dtype])
    found = bench.too_slow(("float32", "bfloat16", "float16"), "cpu")
    assert found == {"bfloat16": "products take 20 times as long as in float32"}


@pytest.mark.slow  # lm-eval takes long to load
def test_a_run_writes_every_part_with_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "slowness", lambda dtype, device: 1.0)
    file = tmp_path / "bench.json"
    parts = [part for part in bench.PARTS if part not in ("start", "memory")]
    assert bench.main(["--size", "tiny", "--only", *parts, "--", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["missing"] == {}
    assert [*dict.fromkeys(row["part"] for row in found["rows"])] == parts
    assert found["size"] == "tiny"
    assert found["device"] in ("cpu", "cuda")
    assert found["machine"]["cores"]
    assert found["environment"]["packages"]["torch"] == torch.__version__
    for row in found["rows"]:
        assert row["low"] <= row["median"] <= row["high"], row
        assert row["met"] == (None if row["target"] is None else row["median"] <= row["target"]), row
        assert row["unit"] in ("times", "s", "TB", "h"), row
    both = {row["measure"] for row in found["rows"] if row["dtype"] == "bfloat16"}
    assert any("search" in name for name in both)
    assert any("statistics" in name for name in both)
    printed = capsys.readouterr().out
    assert "target" in printed
    assert "disk of config/paper.yaml" in printed


def test_a_start_is_of_the_stages_own_imports(tmp_path: Path) -> None:
    for stage in starting.STAGES:
        script = starting.program(stage, "/folder")
        compile(script, stage, "exec")
        assert "from lowrank.jobs.stage import run_stage" in script
        assert ("load_checkpoint('/folder'" in script) == (stage not in starting.WITHOUT_MODEL)
    tiny.model("llama").save_pretrained(tmp_path)
    alone = starting.seconds_of(starting.program("collect_statistics", str(tmp_path)))
    assert 0 < starting.seconds_of("pass") < alone
    with pytest.raises(subprocess.CalledProcessError):
        starting.seconds_of("import a_module_that_is_not_there")


def test_each_kind_of_start_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(starting, "seconds_of", lambda script: asked.append(script) or float(len(asked)))
    monkeypatch.setattr(starting, "forks_are_safe", lambda: False)
    found = starting.rows(TINY)
    assert [row.unit for row in found] == ["s"] * len(starting.STAGES)
    first = found[0]
    assert starting.TURNS == 2
    assert (first.low, first.median, first.high) == (2.25, 2.5, 2.75), "of the second and the third"


def test_each_start_of_a_fork_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(starting, "seconds_of", lambda script: asked.append(script) or float(len(asked)))
    monkeypatch.setattr(starting, "serve_forks", lambda: os.environ.update({SERVER: ":"}))
    found = starting.forks(TINY, tmp_path, {"make_table": "no fork", "collect_statistics": "work()"})
    (row,) = found
    assert row.measure == "start of collect_statistics as a fork to its first computing"
    assert (row.low, row.median, row.high) == (2.25, 2.5, 2.75), "the first one loads modules"
    assert SERVER not in os.environ
    script = (tmp_path / "collect_statistics.py").read_text()
    assert "run_as_fork('collect_statistics')" in script
    assert script.endswith("work()")


def test_what_takes_too_long_is_listed_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(setting: Setting) -> list[Row]:
        time.sleep(60)
        return []

    modules = {
        "tests.benchmarks.gram": SimpleNamespace(rows=lambda setting: [row_of("quick", [1.0])]),
        "tests.benchmarks.layers": SimpleNamespace(rows=sleep),
        "tests.benchmarks.decoding": SimpleNamespace(rows=sleep),
    }
    monkeypatch.setattr(bench.importlib, "import_module", modules.__getitem__)
    started = time.monotonic()
    found, missing = bench.run(["gram", "layers", "decoding"], TINY, minutes=0.01)
    assert time.monotonic() - started < 10
    assert [(part, row.measure) for part, row in found] == [("gram", "quick")]
    assert missing == dict.fromkeys(["layers", "decoding"], "not within 0.01 minutes")


def test_a_part_that_the_gpu_does_not_hold_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(setting: Setting) -> list[Row]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench.importlib, "import_module", lambda name: SimpleNamespace(rows=full))
    assert bench.run(["gram"], TINY, minutes=1) == ([], {"gram": "the GPU's memory does not hold it"})


def test_a_part_whose_process_fails_is_listed_and_the_run_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(setting: Setting) -> list[Row]:
        raise subprocess.CalledProcessError(3, ["python"])

    monkeypatch.setattr(bench.importlib, "import_module", lambda name: SimpleNamespace(rows=fail))
    assert bench.main(["--only", "gram", "memory", "--", str(tmp_path / "bench.json")]) == 1
    missing = json.loads((tmp_path / "bench.json").read_text())["missing"]
    assert missing["gram"].startswith("failed")
    assert missing["memory"] == "needs --model FOLDER"


def test_turns_alternate_after_a_call_that_does_not_count() -> None:
    calls: list[str] = []
    times = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 2, "cpu")
    assert "".join(calls) == "abbaab"
    assert [len(values) for values in times.values()] == [2, 2]


def test_rows_have_the_middle_half_and_meet_targets_from_below() -> None:
    row = row_of("x", [1.0, 2.0, 3.0, 4.0, 5.0], target=3.0)
    assert (row.median, row.low, row.high, row.met) == (3.0, 2.0, 4.0, True)
    assert row_of("x", [3.5], target=3.0).met is False
    assert row_of("x", [3.5]).met is None


def test_a_rank_keeps_no_more_than_its_share() -> None:
    for m, n in ((64, 64), (64, 160), (4096, 11008)):
        rank = whole_rank(0.8, m, n)
        assert rank * (m + n) <= 0.8 * m * n < (rank + 8) * (m + n)


class NoLookingBack(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, for which a graph could not wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {"_local_scalar_dense", "nonzero"} & {func.overloadpacket.__name__}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", decoding.KINDS)
def test_a_step_in_fixed_buffers_decodes_the_same_and_asks_for_no_value(kind: str) -> None:
    model = decoding._model(TINY, "float32", kind)
    prompt = torch.randint(400, (1, 16), generator=torch.Generator().manual_seed(2))
    expected = decoding.decode(model, prompt, 6)
    static = decoding.StaticStep(model, prompt, 6)
    for _ in range(2):  # anew, in the same buffers
        with torch.inference_mode():
            static.begin()
            found = [int(static.ids)]
            for _ in range(5):
                with NoLookingBack():
                    static.step()
                found.append(int(static.ids))
        assert found == expected
