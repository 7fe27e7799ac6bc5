"""Draws docs/rulegraph.svg: which rule reads what which other makes. `make rulegraph` runs it.

Snakemake tells the rules and edges of a config that has them all. Here they get their look: a colour for each file of
rules, and thin lines around the rule that nearly all others read, and the one that reads nearly all others.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURE = REPOSITORY / "docs/rulegraph.svg"
CONFIG = "config/mini-paper.yaml"
COLOURS = {
    "data": "#e3e3e3",
    "calibration": "#d5e8f7",
    "factorization": "#d8efd8",
    "search": "#fdf0c4",
    "compression": "#fbdfc8",
    "post_training": "#f8d4d4",
    "evaluation": "#e4d9f2",
}
READ_BY_ALL, READS_ALL = "fetch_model", "write_provenance"
LOOK = """
    graph [bgcolor=white, margin=0.1, ranksep=0.42, nodesep=0.25]
    node [shape=box, style="rounded,filled", fontname="Helvetica,Arial,sans-serif", fontsize=12, color="#555555"]
    edge [color="#555555", arrowsize=0.7]
"""
THIN = ' [color="#aaaaaa", penwidth=0.7, arrowsize=0.5]'


def files_of_rules() -> dict[str, str]:
    """Rule -> the file that it stands in, in the order of the Snakefile."""
    snakefile = (REPOSITORY / "Snakefile").read_text(encoding="utf-8")
    found = {}
    for file in re.findall(r'^include: "rules/(\w+)\.smk"', snakefile, re.MULTILINE):
        text = (REPOSITORY / f"rules/{file}.smk").read_text(encoding="utf-8")
        found |= dict.fromkeys(re.findall(r"^rule (\w+):", text, re.MULTILINE), file)
    return found


def styled(raw: str) -> str:
    """Snakemake's graph with our look, without the target `all`; equal graphs give equal texts."""
    names: dict[str, str] = dict(re.findall(r'(\d+)\[label = "(\w+)"', raw))
    files = files_of_rules()
    lines = []
    for rule in (rule for rule in files if rule in names.values()):
        small = f"<font point-size='9' color='#555555'>{files[rule]}.smk</font>"
        lines.append(f'{rule} [label=<{rule}<br/>{small}>, fillcolor="{COLOURS.get(files[rule], "#ffffff")}"]')
    for one, other in sorted((names[one], names[other]) for one, other in re.findall(r"(\d+) -> (\d+)", raw)):
        if one in files and other in files:
            lines.append(f"{one} -> {other}{THIN if one == READ_BY_ALL or other == READS_ALL else ''}")
    return f"digraph rules {{{LOOK}" + "".join(f"    {line}\n" for line in lines) + "}\n"


def main() -> str | None:
    """Draw; what is wrong, if something is."""
    if shutil.which("dot") is None:
        return "there is no `dot`: install Graphviz (apt install graphviz, brew install graphviz, or from conda-forge)"
    snakemake = ["snakemake", "--rulegraph", "dot", "--configfile", CONFIG]
    raw = subprocess.run(snakemake, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout
    drawn = subprocess.run(["dot", "-Tsvg"], input=styled(raw), stdout=subprocess.PIPE, text=True, check=True).stdout
    PICTURE.write_text(drawn, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())
