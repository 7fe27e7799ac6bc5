"""Write a checkpoint for other tools: `python workflow_scripts/export.py CHECKPOINT OUT --to dense`.

`make export` calls it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from lowrank.errors import RankwiseError
from lowrank.export.wish import Export
from lowrank.jobs.imports import uncollected


def main(given: Sequence[str]) -> int:
    """Export a checkpoint; returns 0, or 1 for a wish that cannot be granted."""
    parser = argparse.ArgumentParser(prog="export.py", description="Write a checkpoint for other tools.")
    parser.add_argument("checkpoint", nargs="?", default="", help="folder of a checkpoint, compressed or tuned")
    parser.add_argument("out", nargs="?", default="", help="the folder to make, or the .gguf file")
    parser.add_argument("--to", default="dense", help="same, dense or gguf (docs/serving.md)")
    given_as = parser.parse_args(given)
    try:
        wish = Export.of(given_as.checkpoint, given_as.to, given_as.out)
        with uncollected():  # torch and transformers: seconds that a wrong wish need not wait for
            from lowrank.export.share import export

        print(export(wish))
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
