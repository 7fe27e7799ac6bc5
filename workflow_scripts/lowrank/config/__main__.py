"""`python -m lowrank.config schema` prints the JSON schema; `python -m lowrank.config check FILE...` checks configs."""

from __future__ import annotations

import sys

from lowrank.config.load import json_schema, load_study
from lowrank.errors import RankwiseError


def main(arguments: list[str]) -> int:
    """Run one of the two commands; returns the exit code."""
    if arguments == ["schema"]:
        print(json_schema(), end="")
        return 0
    if len(arguments) >= 2 and arguments[0] == "check":
        try:
            for path in arguments[1:]:
                study = load_study(path)
                print(f"{path}: ok, run '{study.run}'")
        except RankwiseError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
