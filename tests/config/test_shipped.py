"""Every config that is shipped is right, by our check and by the JSON schema that editors use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from lowrank.config.__main__ import main
from lowrank.config.load import json_schema, load_study
from lowrank.config.reference import reference
from lowrank.layout import Layout, named_groups
from tests.config.wrong import QUICKSTART, REPOSITORY, ROW, changed

SHIPPED = sorted((REPOSITORY / "config").glob("*.yaml"))
SCHEMA = REPOSITORY / "config/schema.json"
EVALUATION = r"results/[^/]+/" + named_groups("evaluation/{model}/{method}/{ratio}/{tuning}/seed{seed}/{suite}.json")


def test_there_are_configs() -> None:
    assert QUICKSTART in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_right(path: Path) -> None:
    study = load_study(path)
    assert study.tables
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_report_has_a_manifest_of_every_checkpoint_that_is_judged(path: Path) -> None:
    layout = Layout(load_study(path))
    evidence = set(layout.evidence())
    judged = [named.groupdict() for file in evidence if (named := re.fullmatch(EVALUATION, file))]
    assert judged
    for subject in judged:
        assert f"{layout.checkpoint(subject['tuning']).format(**subject)}/manifest.json" in evidence


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_names_the_schema_for_editors(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"


def test_schema_file_is_the_generated_one() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == json_schema(), "run `make schema`"


def test_page_of_keys_is_the_generated_one_and_has_them_all() -> None:
    page = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `make schema`"
    schema = json.loads(json_schema())
    keys = [*schema["properties"], *(key for part in schema["$defs"].values() for key in part["properties"])]
    assert all(f"`{key}`" in page for key in keys if key != "kind")
    kinds = [part["properties"].get("kind", {}).get("const") for part in schema["$defs"].values()]
    assert all(f"`kind: {kind}`" in page for kind in kinds if kind)
    linked = set(re.findall(r"\]\(#(\w+)\)", page))
    assert linked <= {heading.lower() for heading in re.findall(r"^### `(\w+)`$", page, re.MULTILINE)}


@pytest.mark.parametrize(
    ("path", "value"),
    [(("modles",), {}), (("search", "bo-10", "intial"), 3), (("tables", "table_1", "rows", 1, "ratio"), 91)],
)
def test_schema_refuses_what_the_check_refuses(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed((path, value)), json.loads(SCHEMA.read_text()))


def test_plain_form_of_a_study_is_a_study_again() -> None:
    study = load_study(QUICKSTART)
    again = type(study).model_validate(json.loads(json.dumps(study.plain())))
    assert again == study


def test_command_checks_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: x\n")
    assert main(["check", str(bad), str(QUICKSTART)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{QUICKSTART}: ok, run 'quickstart'\n"
    assert f"{bad} has 3 errors" in err
    assert "Traceback" not in err
    assert main(["check", str(QUICKSTART)]) == 0
    assert main(["check"]) == 2
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.endswith(SCHEMA.read_text(encoding="utf-8"))


def test_command_looks_up_what_lies_beside_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = {"file": "table_1", "model": "llama-2-7b", "method": "lrod", "ratio": 20}
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(changed(((*ROW, "published"), published), (("tuning", "scales", "deepspeed"), "x"))))
    assert main(["check", str(bad)]) == 1
    head, first, second, _ = capsys.readouterr().err.split("\n")
    assert head == f"{bad} has 2 errors:"
    assert re.match(r"  line \d+: tables\.table_1\.rows\[1\]\.published\.method: 'lrod' is not in ", first)
    assert first.endswith("did you mean 'lord'?")
    line = 1 + bad.read_text().splitlines().index("    deepspeed: x")
    assert second.startswith(f"  line {line}: tuning.scales.deepspeed: there is no ")


def test_check_starts_fast() -> None:
    code = (
        "import sys, time; began = time.process_time(); import lowrank.config.load; "
        "took = time.process_time() - began; "
        "print([name for name in ('torch', 'numpy', 'transformers', 'pandas') if name in sys.modules], took)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "workflow_scripts", capture_output=True, text=True, check=True
    )
    heavy, _, took = run.stdout.rpartition(" ")
    assert heavy == "[]"
    assert float(took) < 1
