"""Looks at the results of a run while it is disturbed: what is there under its own name must be whole."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder in which jobs write: one that vanishes meanwhile is left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def damage(path: Path) -> str:
    """What is wrong with a file; nothing if it is whole, or gone by now."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".csv" and not path.read_bytes().endswith(b"\n"):
            return "its last line is not complete"
        elif path.suffix == ".safetensors":
            safe_open(path, framework="np").keys()
    except FileNotFoundError:
        return ""
    except (ValueError, SafetensorError) as error:
        return str(error) if path.exists() else ""
    return ""


def hidden(path: Path, run: Path) -> bool:
    """Whether a file is unfinished work (`.state`, temporary names), or a log."""
    parts = path.relative_to(run).parts
    return parts[0] == "logs" or any(part.startswith(".") for part in parts)


class Watcher:
    """Collects damaged files of a run, looking at each whenever it has changed."""

    def __init__(self, run: Path) -> None:
        self.run, self.seen, self.damaged = run, dict[Path, tuple[int, int]](), dict[str, str]()
        self.looked = 0

    def look(self) -> None:
        for path in files_below(self.run):
            if path.suffix not in (".json", ".csv", ".safetensors") or hidden(path, self.run):
                continue
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            version = (state.st_mtime_ns, state.st_size)
            if self.seen.get(path) == version:
                continue
            self.seen[path] = version
            self.looked += 1
            if found := damage(path):
                self.damaged[str(path)] = found


@contextmanager
def watched(run: Path, every: float = 0.05) -> Iterator[Watcher]:
    """Look at a run's files in the background; a damaged one is a failed test."""
    watcher, done = Watcher(run), threading.Event()

    def work() -> None:
        while not done.wait(every):
            watcher.look()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(work)
        try:
            yield watcher
        finally:
            done.set()
        watching.result()  # its error, if it could not look on
    watcher.look()
    assert not watcher.damaged
    assert watcher.looked
