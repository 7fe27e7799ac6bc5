"""What Snakemake says of a dry run, in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.reruns.reasons import BY_ANOTHER_JOB, Planned, differences, explained, reasons

PARAMS = "Params have changed since last execution: Union of exclusive params before and now across all output: "


def changed(before: object, now: object) -> str:
    """As Snakemake writes it."""
    return f"{PARAMS}before: {before!r} now: {now!r} "


def job(reason: str, rule: str = "post_train", commit: str = "", **wildcards: str) -> Planned:
    return Planned(rule, wildcards, reason, ("a", "b"), commit)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (changed({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}), ["`b.c` was 2, and is 3"]),
        (changed({"a": [1, 2]}, {"a": [2, 1]}), ["`a[0]` was 1, and is 2", "`a[1]` was 2, and is 1"]),
        (changed({"a": [1]}, {"a": [1, 2]}), ["`a` was [1], and is [1, 2]"]),
        (changed({}, {"new": 1.0}), ["`new` was not there, and is 1.0"]),
        (changed({"a": 1}, {"a": True}), ["`a` was 1, and is True"]),
        (changed({"a": "x now: y"}, {"a": "z"}), ["`a` was x now: y, and is z"]),
        (
            changed({"code": "aa", "packages": {"torch": "2.13.0"}}, {"code": "bb", "packages": {"torch": "2.14.0"}}),
            [
                "the code that it runs has changed (fingerprint aa before, bb now)",
                "the pinned version of torch was 2.13.0, and is 2.14.0",
            ],
        ),
        ("Missing output files: a, b", ["not made yet"]),
        ("Missing output files: a", ["not made yet"]),
        ("Incomplete output files: a", ["was interrupted before it had finished"]),
        ("Updated input files: config/x.csv", ["reads what has changed since: config/x.csv"]),
        ("Set of input files has changed since last execution", ["reads other files than before"]),
        ("Forced execution", ["asked for by force"]),
        ("Something that Snakemake says in future", ["Something that Snakemake says in future"]),
        (
            f"Set of input files has changed since last execution; {changed({'a': 1}, {'a': 2})}",
            ["reads other files than before", "`a` was 1, and is 2"],
        ),
        (f"Missing output files: a; {BY_ANOTHER_JOB}c", ["not made yet"]),
    ],
)
def test_each_reason_has_words(reason: str, words: list[str]) -> None:
    assert reasons(job(reason)) == words


def test_what_is_missing_of_results_that_were_made_is_named() -> None:
    assert reasons(Planned("rule", {}, "Missing output files: a", ("a", "b"), made=True)) == ["missing: a"]


def test_changed_code_names_the_commit_that_it_was_made_by() -> None:
    (words,) = reasons(job(changed({"code": "aa"}, {"code": "bb"}), commit="0123456789abcdef"))
    assert words.endswith("bb now; see `git diff 0123456789ab -- workflow_scripts`)")


def test_long_values_are_cut() -> None:
    (words,) = reasons(job(changed({"a": "x" * 100}, {"a": "y"})))
    assert words == f"`a` was {'x' * 57}..., and is y"


def test_of_long_values_the_difference_is_shown() -> None:
    one = {"rows": [{"row": {"model": "some-model", "method": "dense", "ratio": ratio}} for ratio in (0, 20, 30)]}
    two = {"rows": one["rows"][:2]}
    last = "{'row': {'model': 'some-model', 'method': 'dense', 'ratio': 30}}"
    assert reasons(job(changed(two, one))) == [f"`rows` has one entry more: {last}"]
    assert reasons(job(changed(one, two))) == [f"`rows` has one entry less: {last}"]
    assert reasons(job(changed(two, {"rows": two["rows"][:1] * 3}))) == [
        "`rows` has 2 entries more, the first: {'row': {'model': 'some-model', 'method': 'dense', 'ratio': 0}}; "
        "has one entry less: {'row': {'model': 'some-model', 'method': 'dense', 'ratio': 20}}"
    ]
    (words,) = reasons(job(changed({"a": "x" * 100 + "old"}, {"a": "x" * 100 + "new"})))
    assert words == f"`a` was ...{'x' * 20}old, and is ...{'x' * 20}new"


def test_the_report_tells_causes_apart_from_what_follows() -> None:
    one = changed({"search": {"evaluations": 50}}, {"search": {"evaluations": 60}})
    jobs = [
        job(one, "search_allocation", model="m", method="bolaco", ratio="20"),
        *(job(BY_ANOTHER_JOB + "x", "compress_model", ratio=str(ratio)) for ratio in (20, 30)),
        job(f"Missing output files: a, b; {BY_ANOTHER_JOB}x", "evaluate_cost", model="m"),
        *(job(changed({"a": 1}, {"a": 2}), "draw_figure", figure=str(number)) for number in range(5)),
        Planned("all", {}, BY_ANOTHER_JOB + "x", ()),
    ]
    assert explained(jobs).split("\n") == [
        "9 jobs would run.",
        "",
        "search_allocation, model m, method bolaco, ratio 20",
        "    `search.evaluations` was 50, and is 60",
        "",
        "evaluate_cost, model m",
        "    not made yet",
        "",
        "5 draw_figure, such as figure 0",
        "    `a` was 1, and is 2",
        "",
        "Because they read what those make: 2 compress_model.",
    ]


def test_nothing_to_do_is_said() -> None:
    assert explained([]).startswith("Nothing would run")
    assert explained([Planned("all", {}, "", ())]).startswith("Nothing would run")


@pytest.mark.parametrize(("before", "now"), [({"a": 1}, {"a": 1}), ([1, {"b": 2}], [1, {"b": 2}]), ("x", "x")])
def test_equal_values_have_no_differences(before: Any, now: Any) -> None:
    assert list(differences(before, now)) == []
