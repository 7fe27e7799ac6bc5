"""Files that are no config at all, and what a user of Snakemake sees of a wrong one."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank.config.load import load_study
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from tests.config.wrong import QUICKSTART, REPOSITORY, ROW, changed

FILES: list[tuple[str, bytes, str]] = [
    ("empty", b"", ": the file is empty; config/quickstart.yaml shows what a config holds"),
    ("comment", b"# nothing\n", ": the file is empty; config/quickstart.yaml shows what a config holds"),
    ("list", b"- run: x\n", ": a config is a mapping of keys to values, not a list"),
    ("text", b"hello\n", ": a config is a mapping of keys to values, not 'hello'"),
    ("twice", b"run: a\nsmoke: true\nrun: b\n", ", line 3: the key 'run' is written twice; keep one"),
    (
        "twice-deep",
        b"search:\n  a: {initial: 2, initial: 3}\n",
        ", line 2: the key 'initial' is written twice; keep one",
    ),
    ("list-key", b"? [a, b]\n: 1\n", ", line 1: a list cannot be a key; write a name"),
    (
        "syntax",
        b"run: x\nseeds: [0, 1\n",
        ", line 3, column 1: no valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    (
        "tab",
        b"run: x\nmodels:\n\ta: 1\n",
        ", line 3, column 1: no valid YAML: found character '\\t' that cannot start any token;"
        " indent by spaces, not tabs",
    ),
    ("alias", b"run: *x\n", ", line 1, column 6: no valid YAML: found undefined alias 'x'"),
    (
        "python",
        b"run: !!python/object/apply:os.system [ls]\n",
        ", line 1, column 6: no valid YAML: could not determine"
        " a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    (
        "merge",
        b"run: {<<: 3}\n",
        ", line 1, column 11: no valid YAML: expected a mapping or list of mappings for merging, but found scalar",
    ),
    ("date", b"run: 2024-99-99\n", ": no valid YAML: month must be in 1..12"),
    ("binary", b"\x00\x01\x02\x03", ": no valid YAML: special characters are not allowed"),
    ("gguf", b"GGUF\xff\xfe\x00", ": no text in UTF-8 (byte 4); is it a YAML file?"),
    ("deep", b"[" * 20000, ": nested too deeply; a config needs no more than ten levels"),
    (
        "octal",
        b"calibration:\n  c: {length: 64, windows: 010}\n",
        ", line 2: calibration.c.windows: YAML reads 010 as 8 (octal); write 10 or 8, or '010' in quotes if it is text",
    ),
    ("octal-9", b"seeds: [0, -019]\n", ", line 1: seeds[1]: YAML reads -019 as text; write -19, or"),
    ("octal-1.2", b"seeds:\n- 0o17\n", ", line 2: seeds[0]: YAML reads 0o17 as text; write 15, or"),
    ("octal-name", b"corpora: {007: {}}\n", ", line 1: corpora.007: YAML reads 007 as 7 (octal); write 7, or '007' in"),
    ("octal-tag", b"seeds: [!!int '010']\n", ", line 1: seeds[0]: YAML reads 010 as 8 (octal); write 10 or 8, or"),
    (
        "octal-merged",
        b"tuning:\n  a: {<<: &few {steps: 0_10}, rank: 4}\n  b: {<<: *few}\n",
        ", line 2: tuning.a.steps: YAML reads 0_10 as 8 (octal); write 10 or 8, or",
    ),
    (
        "sixties",
        b"seeds: [1:30]\n",
        ", line 1: seeds[0]: YAML reads 1:30 as 90 (base 60); write 90, or '1:30' in quotes if it is text",
    ),
    ("sixties-point", b"run: 1:30.5\n", ", line 1: run: YAML reads 1:30.5 as 90.5 (base 60); write 90.5, or"),
    ("recursive", b"run: &a {x: *a}\n", ", line 1, column 6: no valid YAML: found unconstructable recursive node"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(RankwiseError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="there is no such config file"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(RankwiseError, match=r"cannot be read \(Is a directory\)"):
        load_study(tmp_path)


def test_merge_keys_may_override(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}


def test_numbers_that_everybody_reads_alike_and_quoted_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: [0, -0, 1_000, 0x1F, 00.5, .5, 1e-3, 1.0e-3, '010', \"1:30\", 0:30, 0.1.0, 2024-01-02]\n")
    numbers = [0, 0, 1000, 31, 0.5, 0.5, "1e-3", 0.001]
    assert read_yaml(path)["a"] == [*numbers, "010", "1:30", "0:30", "0.1.0", datetime.date(2024, 1, 2)]


def dry_run(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", str(config), "--directory", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_snakemake_shows_the_message_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(changed(((*ROW, "ratio"), 91), (("search", "bo-10", "intial"), 3)), sort_keys=False))
    run = dry_run(path, tmp_path)
    assert run.returncode == 1
    shown = run.stdout + run.stderr
    assert f"{path} has 2 errors:" in shown
    assert "tables.table_1.rows[1].ratio: must be a whole number from 0 to 90, not 91" in shown
    assert "search.bo-10.intial: unknown key - did you mean 'initial'?" in shown
    assert "Traceback" not in shown


def test_snakemake_refuses_a_key_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(QUICKSTART.read_text() + "\nrun: other\n")
    run = dry_run(path, tmp_path)
    assert run.returncode == 1
    assert "the key 'run' is written twice; keep one" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_snakemake_refuses_an_octal_number(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    text = QUICKSTART.read_text()
    assert text.count("intermediate: 1536\n") == 1
    path.write_text(text.replace("intermediate: 1536\n", "intermediate: 01536\n"))
    run = dry_run(path, tmp_path)
    assert run.returncode == 1
    shown = run.stdout + run.stderr
    assert ".shape.intermediate: YAML reads 01536 as 862 (octal); write 1536 or 862, or" in shown
    assert "Traceback" not in shown
