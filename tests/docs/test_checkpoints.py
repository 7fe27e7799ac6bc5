"""docs/checkpoints.md does what it says: its script and its command line, far from this repository."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from transformers import PreTrainedModel

from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.files import layer_name
from lowrank.model.checkpoint import load_checkpoint, recipe_of, save_checkpoint
from lowrank.model.tokenizer import load_tokenizer
from lowrank.ranks.budget import Budget
from tests import tiny, tiny_study

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(TASK,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(GENERATE,) = re.findall(r'^    (python generate\.py "[^"]*") ', PAGE, re.MULTILINE)
(SCORE,) = re.findall(r"^    (lm_eval .*)$", PAGE, re.MULTILINE)

KIND = "llama-gqa"
PRUNED = {"kind": "llm-pruner", "calibration": "c", "importance": "l1", "skip_first": 0, "skip_last": 0}
METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pairs": ({"kind": "svd"}, {"low_rank"}),
    "identity-blocks": ({"kind": "svd", "identity_block": True}, {"identity_block"}),
    "identity-columns": ({"kind": "skipcat", "calibration": "c"}, {"identity_columns", "shared_down"}),
    "biases": ({"kind": "flap", "calibration": "c", "structure": "UL-UM"}, {"heads", "linear"}),
    "heads": (PRUNED, {"heads", "linear"}),
    "narrow-heads": ({"kind": "modegpt", "calibration": "c"}, {"linear", "narrow_heads"}),
    "shortcuts": ({"kind": "slicegpt", "calibration": "c"}, {"linear", "rms_norm", "shortcuts"}),
}
SCORED = ("identity-blocks", "biases", "shortcuts")  # one of each way in which a loader changes a model


def compressed(settings: dict[str, Any], vocabulary: int, folder: Path) -> PreTrainedModel:
    """A tiny model after a method; `folder` is for its statistics."""
    model, shape = tiny.model(KIND, vocabulary), ModelShape(**tiny.shape(KIND, vocabulary))
    tokens = torch.randint(2, vocabulary, (6, 24), generator=torch.Generator().manual_seed(1))
    (folder / "layers").mkdir(parents=True)
    for layer, file in enumerate(collect_statistics(model, tokens, 2, folder, torch.device("cpu"))):
        file.rename(folder / "layers" / layer_name(layer))
    task = {"model": model, "budget": Budget.of(shape), "ratio": 40, "seed": 0, "tokens": tokens}
    compress_model(settings["kind"], settings, task | {"statistics": Statistics(folder / "layers", shape)})
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a method, in folders far from this repository."""
    root = tmp_path_factory.mktemp("far away")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    folders = {}
    for name, (settings, kinds) in METHODS.items():
        model = compressed(settings, len(tokenizer), root / f"statistics-{name}")
        assert {entry["kind"] for entry in recipe_of(model).values()} == kinds
        folders[name] = root / name
        save_checkpoint(model, root / "tokenizer", folders[name])
    return folders


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a folder of its own, in an environment that knows nothing of this repository nor of the hub."""
    folder.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_of_these_tests_does_not_know_the_repository(tmp_path: Path) -> None:
    found = run([sys.executable, "-c", "import lowrank"], tmp_path / "elsewhere")
    assert "No module named 'lowrank'" in found.stderr


def test_the_script_writes_the_text_of_every_kind_of_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    command = shlex.split(GENERATE)
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / command[1]).write_text(SCRIPT, encoding="utf-8")
    done = run([sys.executable, *command[1:], *map(str, checkpoints.values())], tmp_path / "script")
    assert done.returncode == 0, done.stderr
    for folder in checkpoints.values():
        model, tokenizer = load_checkpoint(folder, torch.float32), load_tokenizer(folder)
        ids = tokenizer(command[2], return_tensors="pt").input_ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        assert len(text) > len(command[2])
        assert f"{folder}: {text}\n" in done.stdout


def test_without_trust_a_checkpoint_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "generate.py").write_text(SCRIPT.replace(", trust_remote_code=True", ""), encoding="utf-8")
    done = run([sys.executable, "generate.py", "The", str(checkpoints["pairs"])], tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


ALL_TYPED = """
import json, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex

build, found = TaskIndex.build, {}


def build_once(paths, **options):  # of 14,000 files, for each command line
    key = str(paths)
    if key not in found:
        found[key] = build(paths, **options)
    return dict(found[key])


TaskIndex.build = staticmethod(build_once)
for command in json.loads(sys.argv[1]):
    sys.argv = command
    cli_evaluate()
"""
"""What `lm_eval` does, for several of its command lines."""


@pytest.fixture(scope="module")
def scored(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the harness wrote about each checkpoint by the page's command line, in a folder of its name."""
    folder = tmp_path_factory.mktemp("scored")
    rows, tasks = folder / "rows.jsonl", folder / "tasks"
    tiny_study.write_lines(rows, tiny_study.task_rows()["arc_easy"])
    tasks.mkdir()
    installed = str(Path(lm_eval.tasks.__file__).parent)
    task = TASK.replace("/path/to/site-packages/lm_eval/tasks", installed).replace("/path/to/rows.jsonl", str(rows))
    (tasks / "arc_easy.yaml").write_text(task, encoding="utf-8")
    more = ["--include_path", str(tasks), "--device", "cpu", "--log_samples", "--output_path"]
    commands = [
        [*shlex.split(SCORE.replace("FOLDER", shlex.quote(str(checkpoints[name])))), *more, str(folder / name)]
        for name in SCORED
    ]
    done = run([sys.executable, "-c", ALL_TYPED, json.dumps(commands)], folder / "elsewhere")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", SCORED)
def test_the_harness_scores_a_checkpoint_by_its_command_line(
    name: str, checkpoints: dict[str, Path], scored: Path
) -> None:
    """Its log-likelihoods are those of the model here, token by token."""
    (file,) = (scored / name).rglob("samples_arc_easy_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 6
    model, tokenizer = load_checkpoint(checkpoints[name], torch.float32), load_tokenizer(checkpoints[name])
    for sample in samples:
        for arguments, (answer,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, ending = arguments["arg_0"], arguments["arg_1"]
            ids, known = tokenizer(context + ending).input_ids, len(tokenizer(context).input_ids)
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
            expected = sum(scores[place - 1, ids[place]] for place in range(known, len(ids)))
            assert float(answer[0]) == pytest.approx(float(expected), abs=1e-3)
    (results,) = (scored / name).rglob("results_*.json")
    assert 0 <= json.loads(results.read_text(encoding="utf-8"))["results"]["arc_easy"]["acc,none"] <= 1
