"""Made-up results of a small study, in the formats that the stages write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lowrank.config.outputs import Row
from lowrank.config.sources import ModelShape
from lowrank.config.suites import CostSuite, PerplexitySuite, ZeroShotSuite
from lowrank.model.families import linear_modules
from lowrank.paper.tables import Context, RowResults

Json = dict[str, Any]
SHAPE = ModelShape(
    family="llama",
    layers=4,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=100,
    tied_embeddings=True,
)
TASKS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
ZERO_SHOT = ZeroShotSuite(kind="zero-shot", tasks=TASKS)
PERPLEXITY = PerplexitySuite(kind="perplexity", corpora=["wiki_test", "speeches"], length=256, windows=20)
COST = CostSuite(kind="cost")
SHIFTS = [(number - 9.5) / 100 for number in range(20)]
"""How windows and documents differ from their mean: alike for all rows, so their paired differences have no error."""
ENVIRONMENT = {"device": "cpu", "threads": 2, "machine": "x86_64", "python": "3.11", "packages": {"torch": "2.13"}}


def context(**changes: Any) -> Context:
    suites = {"zs": ZERO_SHOT, "ppl": PERPLEXITY}
    return Context(**{"suites": suites, "shapes": {"tiny": SHAPE}, **changes})


def subject(row: Row, seed: int) -> Json:
    return {"model": row.model, "method": row.method, "ratio": row.ratio, "tuning": row.tuning, "seed": seed}


def zero_shot(row: Row, level: float, seed: int = 0) -> Json:
    tasks = {
        task: {
            "metric": metric,
            metric: level + index / 100,
            f"{metric}_stderr": 0.01 + index / 1000,
            "documents": 20,
            "of": 1000 + index,
            "scores": [level + index / 100 + shift for shift in SHIFTS],
            "documents_sha256": task,
        }
        for index, (task, metric) in enumerate(TASKS.items())
    }
    return {
        "kind": "zero-shot",
        "subject": subject(row, seed),
        "tasks": tasks,
        "average": level + 0.03,
        "average_stderr": 0.0125,
        "environment": ENVIRONMENT,
        "seconds": 10.0,
    }


def perplexity(row: Row, level: float, seed: int = 0) -> Json:
    corpora = {
        corpus: {
            "perplexity": level * (index + 1),
            "stderr": level / 50,
            "tokens": 5100,
            "windows": 20,
            "window_nll": [math.log(level * (index + 1)) + shift for shift in SHIFTS],
            "window_tokens": [255] * len(SHIFTS),
            "tokens_sha256": corpus,
        }
        for index, corpus in enumerate(PERPLEXITY.corpora)
    }
    return {
        "kind": "perplexity",
        "subject": subject(row, seed),
        "corpora": corpora,
        "environment": ENVIRONMENT,
        "seconds": 5.0,
    }


def parameters(removed: float) -> Json:
    dense = 1_000_000
    linears = round(dense * (1 - removed / 100))
    return {
        "total": 200_000 + linears,
        "total_dense": 200_000 + dense,
        "decoder_linears": linears,
        "decoder_linears_dense": dense,
    }


def cost(row: Row, removed: float, seed: int = 0) -> Json:
    counts = parameters(removed)
    return {
        "kind": "cost",
        "subject": subject(row, seed),
        "parameters": counts,
        "macs": {"total": 64 * counts["total"], "linears": 64 * counts["decoder_linears"], "attention": 5, "head": 7},
        "weight_bytes": 4 * counts["total"],
        "disk_bytes": 4 * counts["total"] + 1000,
        "measured": {
            "peak_mib": {"host": 812.5},
            "prefill_tokens_per_second": 250.0 + removed,
            "decode_tokens_per_second": 12.5,
            "repeats": {},
        },
        "environment": ENVIRONMENT,
        "seconds": 3.0,
    }


def manifest(row: Row, removed: float, seed: int = 0, ranks: Json | None = None) -> Json:
    ranks = ranks if ranks is not None else uniform_ranks(20)
    return {
        "subject": subject(row, seed),
        "ranks": ranks,
        "linears": linears(ranks),
        "parameters": parameters(removed),
        "environment": ENVIRONMENT,
        "seconds": 4.0,
    }


def linears(ranks: Json) -> Json:
    """Sizes of the layers as pairs of these ranks, or dense."""
    sizes = {}
    for module in linear_modules(SHAPE):
        m, n, rank = module.out_features, module.in_features, ranks[module.name]
        sizes[module.name] = {
            "out_features": m,
            "in_features": n,
            "parameters": m * n if rank is None else rank * (m + n),
        }
    return sizes


def evidence(*rows: RowResults) -> dict[Path, Json]:
    """Files of results as a run has them, of these rows."""
    found: dict[Path, Json] = {}
    for number, results in enumerate(rows):
        for suite, evaluations in results.evaluations.items():
            found |= {Path(f"evaluation/{number}/seed{seed}/{suite}.json"): e for seed, e in enumerate(evaluations)}
        found |= {Path(f"compressed/{number}/seed{seed}/manifest.json"): m for seed, m in enumerate(results.manifests)}
    return found


def uniform_ranks(rank: int) -> Json:
    """The same rank everywhere, v dense."""
    return {module.name: None if module.type.name == "v" else rank for module in linear_modules(SHAPE)}


def row_results(level: float = 0.5, removed: float | None = None, seeds: int = 1, **row: Any) -> RowResults:
    """A row whose accuracies are around `level` and whose perplexities are `10 / level`."""
    chosen = Row(**{"model": "tiny", "method": "lord", "ratio": 20, **row})
    share = float(chosen.ratio) if removed is None else removed
    shifts = [0.01 * seed for seed in range(seeds)]
    return RowResults(
        row=chosen,
        evaluations={
            "zs": [zero_shot(chosen, level + shift, seed) for seed, shift in enumerate(shifts)],
            "ppl": [perplexity(chosen, 10 / level + shift, seed) for seed, shift in enumerate(shifts)],
            "cost": [cost(chosen, share, seed) for seed in range(seeds)],
        },
        manifests=[manifest(chosen, share, seed) for seed in range(seeds)] if chosen.ratio else [],
        place="tables.t.rows[0]",
        evidence=("../evaluation/a/zs.json", "../evaluation/a/ppl.json"),
    )


def dense_results(level: float = 0.6) -> RowResults:
    return row_results(level, method="dense", ratio=0)


def sensitivity() -> Json:
    """Types that suffer differently from compression; v most of all."""
    steps = {"q": 0.2, "k": 0.3, "v": 14.0, "o": 1.0, "gate": 2.0, "up": 3.5, "down": 6.0}
    return {
        "kind": "sensitivity",
        "subject": {"model": "tiny"},
        "environment": ENVIRONMENT,
        "seconds": 9.0,
        "dense": {"perplexity": 18.4, "stderr": 0.9},
        "types": {
            name: [
                {
                    "kept": kept,
                    "perplexity": 18.4 + step * (1 / kept - 1),
                    "stderr": 0.9 + step / 20,
                    "removed": 1 - kept,
                }
                for kept in (0.8, 0.6, 0.4, 0.2)
            ]
            for name, step in steps.items()
        },
    }
