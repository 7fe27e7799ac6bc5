"""A tiny study: its texts, tasks and config, on the tiny models, so that every stage runs in moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import LLAMA_2_7B, WORDS, model, shape, text, tokenizer


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder: Path) -> None:
    """Model, texts, instructions and the rows of the seven tasks."""
    checkpoint = folder / "model"
    trained = tokenizer()
    model("llama-gqa", len(trained)).save_pretrained(checkpoint)
    trained.save_pretrained(checkpoint)
    for offset, name in enumerate(("calibration", "validation", "test-a", "test-b", "test-c")):
        write_lines(folder / f"{name}.jsonl", [{"text": text(100 * offset + index, 120)} for index in range(20)])
    write_lines(
        folder / "instructions.jsonl",
        [{"instruction": text(index, 6), "input": "", "output": text(900 + index, 12)} for index in range(40)],
    )
    for name, rows in task_rows().items():
        write_lines(folder / "tasks" / f"{name}.jsonl", rows)


def task_rows() -> dict[str, list[dict[str, Any]]]:
    """A few rows a task, in the layout that the harness reads."""
    count = range(6)
    arc = [
        {
            "id": str(i),
            "question": text(i, 8) + "?",
            "choices": {"text": [text(4 * i + k, 2) for k in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in count
    ]
    book = [{**{k: v for k, v in row.items() if k != "question"}, "question_stem": row["question"]} for row in arc]
    return {
        "boolq": [{"question": text(i, 6), "passage": text(i + 50, 20), "idx": i, "label": i % 2} for i in count],
        "piqa": [{"goal": text(i, 5), "sol1": text(i + 9, 5), "sol2": text(i + 20, 5), "label": i % 2} for i in count],
        "hellaswag": [
            {
                "ind": i,
                "activity_label": "Reading",
                "ctx_a": text(i, 8) + ".",
                "ctx_b": "then",
                "ctx": text(i, 8) + ". then",
                "endings": [text(7 * i + k, 4) for k in range(4)],
                "source_id": str(i),
                "split": "val",
                "split_type": "indomain",
                "label": str(i % 4),
            }
            for i in count
        ],
        "winogrande": [
            {
                "sentence": f"{text(i, 4)} _ {text(i + 3, 4)}.",
                "option1": WORDS[i],
                "option2": WORDS[i + 1],
                "answer": str(1 + i % 2),
            }
            for i in count
        ],
        "arc_easy": arc,
        "arc_challenge": arc,
        "openbookqa": book,
    }


def config(folder: Path) -> dict[str, Any]:
    """The quickstart's study, scaled to the tiny model and to files of this machine."""
    names = ("calibration", "validation", "test-a", "test-b", "test-c")
    metrics = {"boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc", "arc_easy": "acc"}
    metrics |= {"arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
    row = {"model": "tiny", "ratio": 20, "tolerance": 4}  # a step of 8 is coarse in a model of this size
    rows = [
        {"model": "tiny", "method": "dense"},
        {**row, "method": "svd"},
        {**row, "method": "lord"},
        {**row, "method": "bolaco"},
        {**row, "method": "bolaco", "tuning": "scales"},
    ]
    published = {"model": "llama-2-7b", "method": "bolaco-5x1", "ratio": 20}
    return {
        "run": "tiny",
        "smoke": True,
        "models": {
            "tiny": {
                "source": {"path": str(folder / "model")},
                "shape": shape("llama-gqa", len(tokenizer())),
                "max_length": 256,
            },
            "random": {
                "source": {"random": 1, "tokenizer": "tiny"},
                "shape": shape("mistral", len(tokenizer())),
                "max_length": 256,
            },
            "llama-2-7b": {  # for the table of arithmetic, which needs a shape and no weights
                "source": {"hub": "meta-llama/Llama-2-7b-hf", "revision": "0" * 40},
                "shape": LLAMA_2_7B,
                "max_length": 256,
            },
        },
        "corpora": {name: {"source": {"path": str(folder / f"{name}.jsonl")}, "format": "jsonl"} for name in names},
        "instructions": {"tiny": {"source": {"path": str(folder / "instructions.jsonl")}, "format": "jsonl"}},
        "tasks": {
            name: {"source": {"path": str(folder / "tasks" / f"{name}.jsonl")}, "reader": "jsonl"} for name in metrics
        },
        "calibration": {"c8": {"corpora": ["calibration"], "windows": 8, "length": 64}},
        "covariance": {
            "pooled": {"estimator": "pooled", "groups": 4},
            "naive": {"estimator": "naive"},
            "fisher": {"estimator": "pooled", "groups": 4, "gradients": "weigh"},
        },
        "validation": {
            "top3": {
                "corpora": ["validation"],
                "windows": 6,
                "length": 64,
                "select": {"keep": 3, "allocations": 3, "groups": 2, "calibration": "c8", "covariance": "pooled"},
            }
        },
        "search": {"bo": {"evaluations": 6, "initial": 3}, "direct": {"evaluations": 1, "initial": 1, "start": []}},
        "sensitivity": {
            "types": {
                "model": "tiny",
                "calibration": "c8",
                "covariance": "pooled",
                "corpus": "validation",
                "windows": 2,
                "length": 64,
                "kept": [0.4, 0.8],
            }
        },
        "methods": {
            "dense": {"kind": "dense"},
            "svd": {"kind": "svd"},
            "lord": {"kind": "lord", "calibration": "c8", "covariance": "naive"},
            "bolaco": {
                "kind": "bolaco",
                "calibration": "c8",
                "covariance": "pooled",
                "validation": "top3",
                "search": "bo",
            },
            "rankwise": {"kind": "rankwise", "calibration": "c8", "covariance": "fisher", "mlp": "both"},
            "flap": {"kind": "flap", "calibration": "c8"},
            "transferred": {
                "kind": "bolaco",
                "calibration": "c8",
                "covariance": "pooled",
                "validation": "top3",
                "search": "direct",
                "transfer": {"model": "tiny", "method": "bolaco"},
            },
        },
        "tuning": {
            "scales": {
                "kind": "scaled-subspace",
                "instructions": "tiny",
                "rank": 4,
                "steps": 3,
                "batch_size": 4,
                "micro_batch_size": 2,
                "warmup_steps": 1,
                "max_length": 250,
                "validation_examples": 4,
                "evaluate_every": 2,
                "dtype": "float32",
            }
        },
        "suites": {
            "held-out": {"kind": "perplexity", "corpora": ["test-a", "test-b", "test-c"], "length": 64, "windows": 2},
            "zero-shot": {"kind": "zero-shot", "limit": 3, "max_length": 128, "tasks": metrics},
            "cost": {"kind": "cost", "prompt_tokens": 16, "new_tokens": 4, "repeats": 1},
            "prompts": {"kind": "generation", "prompts": ["a word", "another"], "new_tokens": 5},
        },
        "tables": {
            "table_1": {
                "kind": "accuracy",
                "title": "Accuracy",
                "suites": ["zero-shot", "held-out"],
                "rows": [
                    {**rows[0], "published": {"file": "table_1", "model": "llama-2-7b", "method": "dense", "ratio": 0}},
                    *rows[1:],
                ],
            },
            "table_2": {
                "kind": "accuracy",
                "title": "Means",
                "suites": ["held-out", "zero-shot"],
                "tasks": "mean",
                "rows": [*rows[:3], {**row, "method": "rankwise"}, {**row, "method": "flap"}],
            },
            "differences": {
                "kind": "differences",
                "title": "Differences",
                "suites": ["held-out"],
                "rows": [{**row, "method": "svd"}, {**row, "method": "flap"}],
            },
            "table_9": {"kind": "generations", "title": "Texts", "suites": ["prompts"], "rows": [rows[0], *rows[3:]]},
            "table_10": {
                "kind": "allocations",
                "title": "Transferred",
                "rows": [{**row, "model": "random", "method": "transferred"}],
            },
            "agreement": {"kind": "agreement", "title": "Agreement", "tables": ["table_1"]},
            "arithmetic": {
                "kind": "arithmetic",
                "title": "Arithmetic",
                "checks": [
                    {
                        "model": "llama-2-7b",
                        "ranks": {"file": "table_8", **published},
                        "statistics": {"file": "table_7", **published},
                    }
                ],
            },
            "table_7": {"kind": "statistics", "title": "Statistics", "suites": ["cost"], "rows": rows[:4]},
            "table_8": {"kind": "allocations", "title": "Ranks", "rows": [rows[2], rows[3]]},
            "times": {"kind": "times", "title": "Times", "suites": ["cost"], "rows": rows[3:]},
        },
        "figures": {
            "figure_1": {"kind": "sensitivity", "title": "Sensitivity", "sensitivity": ["types"]},
            "figure_3": {
                "kind": "perplexity",
                "title": "Perplexity",
                "model": "tiny",
                "suite": "held-out",
                "methods": ["svd", "lord", "bolaco"],
                "ratios": [20],
                "tolerance": 4,
            },
            "figure_4": {"kind": "heat-map", "title": "Rise of the loss", "suite": "held-out", "rows": rows[:3]},
            "figure_5": {"kind": "comparison", "title": "Comparison", "suite": "held-out", "rows": rows},
            "figure_6": {
                "kind": "search",
                "title": "Search",
                "model": "tiny",
                "methods": ["bolaco"],
                "ratios": [20],
            },
        },
    }


def write_study(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write all inputs and the config into a folder; returns the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config(folder) | (changes or {}), sort_keys=False), encoding="utf-8")
    return path
