"""Peak memory of the stages on a real model, beside the estimates of `cluster.resources`: `make memory MODEL=folder`.

    python tests/benchmarks/memory.py MODEL [FOLDER]

MODEL is a folder with a small model in the Hugging Face layout, in float32 (SmolLM2-135M takes some ten minutes on two
cores). A study of random words runs in FOLDER, or in a temporary one, one job at a time; what each job logs as its peak
is compared with the estimate for it. Without a GPU the two memories of an estimate, the device's and the host's, are
one. Ends with 1 if an estimate misses by more than a quarter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]
from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.cluster.resources import LAYERS_PER_PASS as LAYERWISE
from lowrank.cluster.resources import Estimator
from lowrank.config.load import load_study
from tests import tiny, tiny_study
from tests.benchmarks.measuring import Row, Setting, row_of

NAME = "memory.yaml"
TOLERANCE = 0.25
LAYERS_PER_PASS = 15
PEAK = re.compile(r"finished in ([\d.]+) s, peak memory (\d+) MiB(?:, (\d+) MiB in the largest)?")
LOGS = {  # the rules that are compared, and where their logs lie
    **dict.fromkeys(LAYERWISE, "{model}/{calibration}"),
    "compute_bases": "{model}/{calibration}/{covariance}",
    "eliminate_neurons": "{model}/{calibration}/{covariance}/{multiple}",
    "select_validation": "{model}/{validation}",
    "measure_sensitivity": "{sensitivity}",
    "search_allocation": "{model}/{method}/{ratio}/seed{seed}",
    "compress_model": "{model}/{method}/{ratio}/seed{seed}",
    "post_train": "{model}/{method}/{ratio}/{tuning}/seed{seed}",
    **dict.fromkeys(
        ("evaluate_perplexity", "evaluate_zero_shot", "evaluate_cost", "evaluate_generation"),
        "{model}/{method}/{ratio}/{tuning}/seed{seed}/{suite}",
    ),
}


def shape_of(folder: Path) -> dict[str, Any]:
    """The config's `shape` of a model, from its own configuration."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = raw["num_attention_heads"]
    return {
        "family": raw["model_type"],
        "layers": raw["num_hidden_layers"],
        "hidden": raw["hidden_size"],
        "intermediate": raw["intermediate_size"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads", heads),
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "vocabulary": raw["vocab_size"],
        "tied_embeddings": raw.get("tie_word_embeddings", False),
    }


def write_study(model: Path, folder: Path) -> None:
    """A study that runs each stage once or twice, on random words; every method once."""
    for offset, name in enumerate(("calibration", "validation", "test")):
        rows = [{"text": tiny.text(100 * offset + index, 2000)} for index in range(20)]
        tiny_study.write_lines(folder / f"{name}.jsonl", rows)
    tiny_study.write_lines(
        folder / "instructions.jsonl",
        [{"instruction": tiny.text(i, 40), "input": "", "output": tiny.text(900 + i, 60)} for i in range(40)],
    )
    tasks = {"piqa": "acc", "hellaswag": "acc_norm"}
    for name in tasks:
        tiny_study.write_lines(folder / "tasks" / f"{name}.jsonl", tiny_study.task_rows()[name])
    row = {"model": "model", "ratio": 20, "tolerance": 5}
    methods = ("svd", "lord", "svd-llm", "rankwise", "bolaco")
    path = folder / NAME
    study = {
        "run": "memory",
        "smoke": True,
        "models": {"model": {"source": {"path": str(model)}, "shape": shape_of(model), "dtype": "float32"}},
        "corpora": {
            name: {"source": {"path": str(folder / f"{name}.jsonl")}, "format": "jsonl"}
            for name in ("calibration", "validation", "test")
        },
        "instructions": {"words": {"source": {"path": str(folder / "instructions.jsonl")}, "format": "jsonl"}},
        "tasks": {
            name: {"source": {"path": str(folder / "tasks" / f"{name}.jsonl")}, "reader": "jsonl"} for name in tasks
        },
        "calibration": {"words": {"corpora": ["calibration"], "windows": 16, "length": 1024, "gradient_windows": 2}},
        "covariance": {
            "pooled": {"estimator": "pooled", "groups": 4},
            "fisher": {"estimator": "pooled", "groups": 4, "gradients": "weigh"},
        },
        "validation": {
            "words": {
                "corpora": ["validation"],
                "windows": 8,
                "length": 1024,
                "select": {"keep": 4, "allocations": 2, "calibration": "words", "covariance": "pooled"},
            }
        },
        "search": {"short": {"evaluations": 4, "initial": 3}},
        "sensitivity": {
            "types": {
                "model": "model",
                "calibration": "words",
                "covariance": "pooled",
                "corpus": "validation",
                "windows": 2,
                "length": 512,
                "kept": [0.5],
            }
        },
        "methods": {
            "dense": {"kind": "dense"},
            "svd": {"kind": "svd"},
            "lord": {"kind": "lord", "calibration": "words", "covariance": "pooled"},
            "svd-llm": {"kind": "svd-llm", "calibration": "words"},
            "rankwise": {"kind": "rankwise", "calibration": "words", "covariance": "fisher", "mlp": "both"},
            "bolaco": {
                "kind": "bolaco",
                "calibration": "words",
                "covariance": "pooled",
                "validation": "words",
                "search": "short",
            },
        },
        "tuning": {
            "scales": {
                "kind": "scaled-subspace",
                "instructions": "words",
                "rank": 32,
                "steps": 2,
                "batch_size": 4,
                "micro_batch_size": 4,
                "warmup_steps": 1,
                "max_length": 128,
                "validation_examples": 4,
                "evaluate_every": 2,
                "dtype": "float32",
            }
        },
        "suites": {
            "held-out": {"kind": "perplexity", "corpora": ["test"], "length": 1024, "windows": 4},
            "zero-shot": {"kind": "zero-shot", "limit": 2, "batch_tokens": 1024, "max_length": 512, "tasks": tasks},
            "cost": {"kind": "cost", "prompt_tokens": 128, "new_tokens": 4, "repeats": 1},
            "prompts": {"kind": "generation", "prompts": ["The river"], "new_tokens": 8},
        },
        "tables": {
            "main": {
                "kind": "accuracy",
                "title": "Accuracy",
                "suites": ["held-out", "zero-shot"],
                "rows": [{"model": "model", "method": "dense"}, {**row, "method": "bolaco"}],
            },
            "tuned": {
                "kind": "accuracy",
                "title": "Tuned",
                "suites": ["held-out"],
                "rows": [{**row, "method": "bolaco", "tuning": "scales"}],
            },
            "cost": {
                "kind": "statistics",
                "title": "Cost",
                "suites": ["cost"],
                "rows": [{**row, "method": name} for name in methods],
            },
            "texts": {
                "kind": "generations",
                "title": "Texts",
                "suites": ["prompts"],
                "rows": [{**row, "method": "bolaco"}],
            },
        },
        "figures": {"types": {"kind": "sensitivity", "title": "Types", "sensitivity": ["types"]}},
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")


def run(config: Path) -> None:
    """Run the study, one job at a time: all that are compared take all cores."""
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(config.parent)),
        *("--configfile", str(config), "--cores", "2", "--set-threads", "compress_model=2", "sample_calibration=2"),
        *("--set-resources", *(f"{rule}:layers_per_pass={LAYERS_PER_PASS}" for rule in LAYERWISE)),
    ]
    log = config.with_suffix(".log")
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # its jobs as well
            raise
    if code:
        print(log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        raise subprocess.CalledProcessError(code, command[:3])


def rows(setting: Setting) -> list[Row]:
    """Of each job that is compared, the estimate against the peak."""
    assert setting.model is not None
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / NAME
        write_study(setting.model.resolve(), config.parent)
        run(config)
        return [
            row_of(f"memory, {name_of(job)}: planned / peak", [estimate / peak], target=1.3, least=0.8)
            for job, _, peak, estimate in measured(config)
        ]


def name_of(job: Job) -> str:
    """Its rule, and what of the study it is about."""
    values = (job.wildcards.get(name, "none") for name in ("covariance", "method", "tuning", "suite"))
    return " ".join([job.rule, *(name for name in values if name != "none")])


def measured(config: Path) -> Iterator[tuple[Job, float, float, float]]:
    """Each job that is compared, with its seconds, its peak and the estimate of it, in MiB."""
    study = load_study(config)
    estimator = Estimator(study, **dict.fromkeys(LAYERWISE, LAYERS_PER_PASS))
    for job in planned_jobs(study):
        # A dense checkpoint's files are linked: its weights are mapped into memory, and never read.
        if job.rule not in LOGS or (job.rule == "compress_model" and job.wildcards["method"] == "dense"):
            continue
        name = LOGS[job.rule].format(**job.wildcards)
        log = config.parent / f"results/{study.run}/logs/{job.rule}/{name}.log"
        found = PEAK.search(log.read_text(encoding="utf-8"))
        assert found, f"{log}: no peak"
        seconds, own, children = (float(value or 0) for value in found.groups())
        yield job, seconds, own + children, estimator.need(job.rule, job.wildcards).host_bytes(0) / 2**20


def main(arguments: list[str]) -> int:
    """Run, compare and print."""
    if len(arguments) not in (1, 2) or not (Path(arguments[0]) / "config.json").is_file():
        print("usage: memory.py MODEL [FOLDER]; MODEL is a folder in the Hugging Face layout", file=sys.stderr)
        return 2
    misses = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments[1] if len(arguments) == 2 else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / NAME
        if not config.is_file():
            write_study(Path(arguments[0]).resolve(), folder)
        run(config)
        print(f"{'rule':20} {'of':24} {'seconds':>8} {'MiB':>6} {'estimate':>9} {'ratio':>6}")
        for job, seconds, peak, estimate in measured(config):
            rule, _, what = name_of(job).partition(" ")
            missed = abs(estimate / peak - 1) > TOLERANCE
            misses += missed
            mark = " !" if missed else ""
            print(f"{rule:20} {what:24} {seconds:8.0f} {peak:6.0f} {estimate:9.0f} {estimate / peak:6.2f}{mark}")
    print(f"{misses} estimates miss by more than {TOLERANCE:.0%}")
    return int(misses > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
