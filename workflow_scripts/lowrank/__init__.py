"""Low-rank compression of language models: the library behind the rules. Nothing in it imports Snakemake.

It is laid out in rooms, files and packages; `docs/architecture.md` says what lives in each.
"""

ROOMS = (
    *("errors", "redact", "terminal", "versions", "files", "manifest", "reruns", "model"),
    *("ranks", "config", "layout", "jobs"),
    *("sources", "calibration", "bases", "search", "compression", "methods", "post_training", "evaluation", "paper"),
    *("export", "cluster", "progress"),
)
"""From the ground up, in the order of the DAG: a room imports only rooms that stand before it."""
