"""Commands that print what they find in a folder: `python -m lowrank.paper.show FOLDER` and its like."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from lowrank.errors import RankwiseError

PIPE_WIDTH = 120
"""Of lines that go to a file or a pipe, which has no width of its own."""


def print_folder(
    arguments: Sequence[str], usage: str | None, show: Callable[[Path, Console], None], highlight: bool = True
) -> int:
    """Run such a command.

    Args:
        arguments: of the command line: the folder.
        usage: what to say if there is not one argument.
        show: prints what it finds.
        highlight: let numbers and paths stand out on a terminal.

    Returns:
        The exit code: 0; 1 after a `RankwiseError`, which is printed; 2 for wrong arguments.
    """
    if len(arguments) != 1:
        print(usage, file=sys.stderr)
        return 2
    console = Console(highlight=highlight)
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH, highlight=highlight)
    try:
        show(Path(os.path.expanduser(arguments[0])), console)
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
