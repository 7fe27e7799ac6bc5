"""`python -m lowrank.config check FILE...` checks configs.

`python -m lowrank.config schema` prints their JSON schema, `python -m lowrank.config reference` their keys in Markdown.
"""

from __future__ import annotations

import sys

from lowrank.config.beside import check_beside
from lowrank.config.lines import Lines
from lowrank.config.load import check_study, json_schema, models_without_shape
from lowrank.config.reference import reference
from lowrank.config.sources import PathSource
from lowrank.config.use import SHIPPED
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError


def main(arguments: list[str]) -> int:
    """Run one of the commands.

    Returns:
        The exit code: 0 if all is well, 1 if a config is wrong, 2 for a call that is none of them.
    """
    if arguments in (["schema"], ["reference"]):
        print(json_schema() if arguments == ["schema"] else reference(), end="")
        return 0
    if len(arguments) >= 2 and arguments[0] == "check":
        return max(_check(path) for path in arguments[1:])
    print(__doc__, file=sys.stderr)
    return 2


def _check(path: str) -> int:
    try:
        raw = read_yaml(path)
        study = check_study(raw, path, [path], unseen=True)
        check_beside(study, SHIPPED, path, Lines([path], raw))
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{path}: ok, run '{study.run}'")
    for name in models_without_shape(study):
        source = study.models[name].source
        why = (
            f"there is no model at {source.path} on this machine. Correct the path, or write `shape:`"
            if isinstance(source, PathSource)
            else "the model is not on this machine yet. Write `shape:`, or fetch with `snakemake data`"
        )
        print(f"{path}: not known is the shape of {name}, and so whether what is asked of it is within reach: {why}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
