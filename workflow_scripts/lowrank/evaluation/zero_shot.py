"""Zero-shot accuracy by the Language Model Evaluation Harness (lm-eval), in process, on local files.

Prompts, scoring of answers and metrics are those of the installed lm-eval.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval import evaluate as run_harness
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from lowrank.calibration.corpora import default_bos
from lowrank.config.suites import ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.evaluation.answer_scorer import AnswerScorer
from lowrank.evaluation.answers import count_answers
from lowrank.evaluation.task_files import ScoredRows, find_rows, write_tasks
from lowrank.jobs.share import ALONE, Share
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.devices import pick_devices
from lowrank.model.runtime import parse_dtype, seed_everything
from lowrank.model.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
METRICS = ("acc", "acc_norm")
HARNESS_LOGS = ("lm_eval.models.huggingface", "lm_eval.api.task")
"""Loggers that warn of what is meant here (a model that is already open, a metric's default mean) with each task."""


def evaluate_share(arguments: dict[str, Any], share: Share) -> dict[str, Any]:
    """A process's share of an evaluation.

    Args:
        arguments: "checkpoint" (folder), "dtype", "suite" (as a plain dict), "rows" (task -> folder), "longest".
        share: this process among those of the job.

    Returns:
        See `evaluate_zero_shot`.
    """
    checkpoint = arguments["checkpoint"]
    model = load_checkpoint(checkpoint, parse_dtype(arguments["dtype"]), pick_devices())
    suite = ZeroShotSuite.model_validate(arguments["suite"])
    tokenizer = load_tokenizer(checkpoint)
    return evaluate_zero_shot(model, tokenizer, suite, arguments["rows"], arguments["longest"], share)


def evaluate_zero_shot(
    model: PreTrainedModel,
    tokenizer: Any,
    suite: ZeroShotSuite,
    rows: Mapping[str, str | Path],
    longest: int,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Score a model on the tasks of a suite.

    Args:
        model: in evaluation mode, on the device that computes.
        tokenizer: the model's.
        suite: tasks with the metric of the average, limit, tokens of a batch, BOS, longest context, seed.
        rows: task -> folder with its `test.jsonl` or `validation.jsonl`, rows as on the hub.
        longest: the longest context of the model, tokens; the suite's `max_length` may be shorter.
        share: this process among those of the job; each runs some of the batches, and all return the same.

    Returns:
        "tasks": task -> {"metric", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "documents", "of", "scores",
        "documents_sha256"} (no `acc_norm` where the task has none; the metric's 0 or 1 for each document, in the order
        of the hash), with what `count_answers` adds; "average" over the tasks' metrics and "average_stderr", which
        takes tasks as independent, `sqrt(sum_t se_t^2) / T`; "protocol": what else defines the numbers.

    Raises:
        RankwiseError: an unknown task or metric, a missing split, rows that do not fit; task and file are named.
    """
    scored = [find_rows(task, rows[task]) for task in suite.tasks]
    _settle_libraries(suite.seed)
    scorer = _scorer(model, tokenizer, suite, longest, share)
    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rankwise-tasks-") as folder:
        write_tasks(folder, scored)
        manager = TaskManager(include_path=folder, include_defaults=False)
        for entry in scored:
            started = time.monotonic()
            raw = _run(scorer, manager, entry, suite)
            results[entry.task] = _result(entry, suite.tasks[entry.task], raw)
            versions[entry.task] = raw["versions"][entry.task]
            _report(entry.task, results[entry.task], time.monotonic() - started)
    protocol = {
        "harness": f"lm-eval {version('lm_eval')}",
        "task_versions": versions,
        "splits": {entry.task: entry.split for entry in scored},
        "shots": 0,
        "chat_template": False,
        "bos_token": default_bos(tokenizer) if suite.add_bos else None,
        "context_tokens": scorer.max_length,
    }
    return {"tasks": results, **_average(results), "protocol": protocol}


def _settle_libraries(seed: int) -> None:
    """Seeds, no progress bars or idle warnings, and no leftovers of a launcher: with them lm-eval returns nothing."""
    for variable in LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    for name in HARNESS_LOGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    random.seed(seed)
    seed_everything(seed)


def _scorer(model: PreTrainedModel, tokenizer: Any, suite: ZeroShotSuite, longest: int, share: Share) -> AnswerScorer:
    context, positions = min(suite.max_length, longest), model.config.max_position_embeddings
    if context > positions:
        raise RankwiseError(
            f"a context of {context} tokens, but the model reads at most {positions}; lower `max_length`"
        )
    scorer = AnswerScorer(pretrained=model, tokenizer=tokenizer, max_length=context, add_bos_token=suite.add_bos)
    scorer.batch_tokens, scorer.share = suite.batch_tokens, share
    return scorer


def _run(scorer: AnswerScorer, manager: TaskManager, entry: ScoredRows, suite: ZeroShotSuite) -> dict[str, Any]:
    """lm-eval's result for one task."""
    try:
        loaded = manager.load([entry.task])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=suite.seed)
    except (KeyError, IndexError, TypeError, ValueError, TemplateError, DatasetsError) as error:
        raise _unusable(entry, error) from error
    try:
        raw: dict[str, Any] = run_harness(
            scorer, loaded, limit=suite.limit, bootstrap_iters=1000, log_samples=True, cache_requests=False
        )
    except (KeyError, TemplateError) as error:
        raise _unusable(entry, error) from error
    except RankwiseError as error:
        raise RankwiseError(f"task '{entry.task}': {error}") from error
    return raw


def _unusable(entry: ScoredRows, error: Exception) -> RankwiseError:
    return RankwiseError(
        f"task '{entry.task}': lm-eval cannot use {entry.file} ({type(error).__name__}: {error}); it needs rows as the "
        "task reads them from the hub"
    )


def _result(entry: ScoredRows, metric: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    values = raw["results"][entry.task]
    found = {name: values[f"{name},none"] for name in METRICS if f"{name},none" in values}
    if metric not in found:
        raise RankwiseError(
            f"task '{entry.task}' has no metric '{metric}', only {', '.join(found) or 'others'}; "
            f"change `tasks.{entry.task}` in the zero-shot suite"
        )
    result: dict[str, Any] = {"metric": metric}
    for name, value in found.items():
        result |= {name: value, f"{name}_stderr": values[f"{name}_stderr,none"]}
    counts = raw["n-samples"][entry.task]
    documents = raw["samples"][entry.task]
    hashes = "".join(document["doc_hash"] for document in documents)
    return result | {
        "documents": counts["effective"],
        "of": counts["original"],
        "scores": [int(document[metric]) for document in documents],
        "documents_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        **count_answers(documents, metric, raw["configs"][entry.task]["target_delimiter"]),
    }


def _average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    values = [result[result["metric"]] for result in results.values()]
    errors = [result[f"{result['metric']}_stderr"] for result in results.values()]
    return {
        "average": math.fsum(values) / len(values),
        "average_stderr": math.sqrt(math.fsum(error**2 for error in errors)) / len(errors),
    }


def _report(task: str, result: Mapping[str, Any], seconds: float) -> None:
    metric = result["metric"]
    log.info(
        "%s: %s %.3f +- %.3f on %d of %d documents, %.1f s",
        task,
        metric,
        result[metric],
        result[f"{metric}_stderr"],
        result["documents"],
        result["of"],
        seconds,
    )
    if "answers" in result:
        shares = ", ".join(
            f"'{answer}' to {share['given']:.0%} (correct for {share['correct']:.0%})"
            for answer, share in result["answers"].items()
        )
        auc = f"; auc {result['auc']:.3f}" if "auc" in result else ""
        log.info("%s: says %s; a guess without reading, at these shares: %.3f%s", task, shares, result["blind"], auc)
