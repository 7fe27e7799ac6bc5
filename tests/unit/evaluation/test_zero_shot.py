"""Zero-shot scores equal those of stock lm-eval, and bad rows, tasks and metrics are named."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.config import suites
from lowrank.config.suites import ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.evaluation.task_files import SCHEMAS, find_rows, find_tasks, write_tasks
from lowrank.evaluation.zero_shot import evaluate_zero_shot
from lowrank.sources import tasks as sources

CHOICES = {"text": ["a long answer", "no", "a cup", "the sun"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": f"is {n} even", "passage": "Numbers. " * n, "idx": n, "label": int(n != 2)} for n in range(1, 5)
    ],
    "piqa": [
        {"goal": f"Boil {n} eggs", "sol1": "Use a pot.", "sol2": "Use a hat" * (n + 1), "label": 0} for n in range(4)
    ],
    "hellaswag": [
        {
            "activity_label": "Sport",
            "ctx_a": "A man runs.",
            "ctx_b": f"he has {n} shoes",
            "ctx": "",
            "endings": ["He stops.", "He flies to the moon [title] fast.", "It rains.", "End"],
            "label": str(n % 4),
        }
        for n in range(4)
    ],
    "winogrande": [
        {
            "sentence": f"The cat saw the dog {n} times so _ ran off.",
            "option1": "the cat",
            "option2": "dog",
            "answer": "1",
        }
        for n in range(4)
    ],
    "arc_easy": [{"id": str(n), "question": f"What is {n}?", "choices": CHOICES, "answerKey": "B"} for n in range(4)],
    "arc_challenge": [{"id": str(n), "question": f"Why {n}?", "choices": CHOICES, "answerKey": "A"} for n in range(4)],
    "openbookqa": [{"id": str(n), "question_stem": f"As {n}", "choices": CHOICES, "answerKey": "D"} for n in range(4)],
}
METRICS = dict.fromkeys(ROWS, "acc") | {"hellaswag": "acc_norm", "openbookqa": "acc_norm"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after `<pad>` (id 0) and `<s>` (id 1); texts start with `<s>` by default."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1} | {letter: index for index, letter in enumerate(alphabet, start=2)}
    base = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def write_rows(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (target / f"{SCHEMAS[task].split}.jsonl").write_text(text, encoding="utf-8")
    return target


def make_suite(tasks: dict[str, str], **settings: Any) -> ZeroShotSuite:
    return ZeroShotSuite.model_validate({"kind": "zero-shot", "tasks": tasks, "batch_tokens": 900} | settings)


@pytest.mark.slow
def test_all_tasks_equal_a_stock_run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm-eval would return nothing
    folders = {task: write_rows(tmp_path, task, rows) for task, rows in ROWS.items()}
    found = evaluate_zero_shot(model, tokenizer, make_suite(METRICS, max_length=512), folders, 256)
    assert "LOCAL_RANK" not in os.environ
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "a log is for what matters"

    yamls = tmp_path / "yamls"
    yamls.mkdir()
    write_tasks(yamls, [find_rows(task, folder) for task, folder in folders.items()])
    stock = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256, add_bos_token=True),
        tasks=list(ROWS),
        task_manager=TaskManager(include_path=str(yamls), include_defaults=False),
        bootstrap_iters=10,
    )
    for task, metric in METRICS.items():
        entry = found["tasks"][task]
        assert entry["metric"] == metric
        assert (entry["documents"], entry["of"]) == (4, 4)
        for name in ("acc", "acc_norm"):
            assert entry.get(name) == stock["results"][task].get(f"{name},none")
            assert entry.get(f"{name}_stderr") == stock["results"][task].get(f"{name}_stderr,none")
        assert entry["scores"] == [document[metric] for document in stock["samples"][task]]
        assert ("answers" in entry) == (task not in ("piqa", "winogrande")), "the rows of the others share answers"
    labels = [row["label"] for row in ROWS["boolq"]]
    given = [
        label if right else 1 - label for label, right in zip(labels, found["tasks"]["boolq"]["scores"], strict=True)
    ]
    shares = {"no": (given.count(0) / 4, 0.25), "yes": (given.count(1) / 4, 0.75)}
    assert {
        name: (share["given"], share["correct"]) for name, share in found["tasks"]["boolq"]["answers"].items()
    } == shares
    scores = [found["tasks"][task][metric] for task, metric in METRICS.items()]
    errors = [found["tasks"][task][f"{metric}_stderr"] for task, metric in METRICS.items()]
    assert len(set(scores)) > 2  # the comparison is not one of zeros
    assert found["average"] == pytest.approx(sum(scores) / 7)
    assert found["average_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 7)
    assert found["protocol"]["context_tokens"] == 256
    assert found["protocol"]["bos_token"] == 1
    assert found["protocol"]["splits"]["arc_easy"] == "test"
    assert found["protocol"]["task_versions"]["boolq"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_answers_given_are_those_that_lm_eval_counts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, metric: str
) -> None:
    for label, ending in enumerate(ROWS["hellaswag"][0]["endings"]):
        folder = write_rows(tmp_path, "hellaswag", [row | {"label": str(label)} for row in ROWS["hellaswag"]])
        found = evaluate_zero_shot(model, tokenizer, make_suite({"hellaswag": metric}), {"hellaswag": folder}, 512)
        task = found["tasks"]["hellaswag"]
        (share,) = [share for share in task["answers"].values() if share["correct"] == 1]
        assert share["given"] == task[metric] == task["blind"], ending


def test_a_limit_is_recorded_and_changed_rows_are_seen(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    suite = make_suite({"piqa": "acc"}, limit=2)
    folder = write_rows(tmp_path, "piqa", ROWS["piqa"])
    first = evaluate_zero_shot(model, tokenizer, suite, {"piqa": folder}, 512)["tasks"]["piqa"]
    assert (first["documents"], first["of"]) == (2, 4)
    write_rows(tmp_path, "piqa", [row | {"label": 1} for row in ROWS["piqa"]])
    second = evaluate_zero_shot(model, tokenizer, suite, {"piqa": folder}, 512)["tasks"]["piqa"]
    assert first["acc"] + second["acc"] == 1
    assert [a + b for a, b in zip(first["scores"], second["scores"], strict=True)] == [1, 1]
    assert first["documents_sha256"] != second["documents_sha256"]


def test_a_metric_that_the_task_lacks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = write_rows(tmp_path, "boolq", ROWS["boolq"])
    with pytest.raises(RankwiseError, match="task 'boolq' has no metric 'acc_norm', only acc"):
        evaluate_zero_shot(model, tokenizer, make_suite({"boolq": "acc_norm"}), {"boolq": folder}, 512)


def test_a_model_without_finite_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    broken = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    broken.lm_head.weight.fill_(torch.nan)
    folder = write_rows(tmp_path, "piqa", ROWS["piqa"])
    with pytest.raises(RankwiseError, match="task 'piqa': the model's log-likelihoods are not finite"):
        evaluate_zero_shot(broken, tokenizer, make_suite({"piqa": "acc"}), {"piqa": folder}, 512)


@pytest.mark.parametrize("task", SCHEMAS)
def test_a_field_that_is_missing_is_named(tmp_path: Path, task: str) -> None:
    field = SCHEMAS[task].fields[0]
    rows = [ROWS[task][0], {name: value for name, value in ROWS[task][1].items() if name != field}]
    folder = write_rows(tmp_path, task, rows)
    with pytest.raises(RankwiseError, match=rf"task '{task}': .*{SCHEMAS[task].split}\.jsonl, line 2: without {field}"):
        find_rows(task, folder)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, "arc_easy", ROWS["arc_easy"])
    (tmp_path / "arc_easy" / "test.jsonl").rename(tmp_path / "arc_easy" / "validation.jsonl")
    with pytest.raises(RankwiseError, match=r"task 'arc_easy': .*arc_easy/test\.jsonl is missing"):
        find_rows("arc_easy", tmp_path / "arc_easy")
    with pytest.raises(RankwiseError, match=r"task 'other': .*test\.jsonl or .*validation\.jsonl is missing"):
        find_rows("other", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1: no JSON"), ("", "has 0 rows"), (json.dumps(ROWS["piqa"][0]), "has 1 rows")],
)
def test_damaged_rows(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "validation.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(RankwiseError, match=rf"task 'piqa': .*validation\.jsonl.* {message}"):
        find_rows("piqa", tmp_path)


def test_rows_of_another_task_are_refused_by_lm_eval(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = write_rows(tmp_path, "piqa", ROWS["piqa"])
    with pytest.raises(RankwiseError, match=r"task 'sciq': lm-eval cannot use .*validation\.jsonl \(UndefinedError"):
        evaluate_zero_shot(model, tokenizer, make_suite({"sciq": "acc"}), {"sciq": folder}, 512)


def test_the_schemas_name_the_splits_that_lm_eval_scores() -> None:
    for task, path in find_tasks(SCHEMAS).items():
        config: dict[str, Any] = {}
        for file in (path.parent / "arc_easy.yaml", path) if task == "arc_challenge" else (path,):
            text = file.read_text(encoding="utf-8").replace("!function", "")
            config |= yaml.safe_load(text)
        assert SCHEMAS[task].split == (config.get("test_split") or config["validation_split"])
        assert suites.METRICS[task] == tuple(metric["metric"] for metric in config["metric_list"])
    assert set(suites.METRICS) == set(sources.SCHEMAS)


def test_an_unknown_task_gets_near_names() -> None:
    with pytest.raises(RankwiseError, match="has no task 'hellaswagg' - did you mean hellaswag or"):
        find_tasks(["hellaswagg"])
    with pytest.raises(RankwiseError, match=r"has no task 'qqqqqqqqqqqq'$"):
        find_tasks(["qqqqqqqqqqqq"])
