"""Fingerprints of code that has not changed since they were found, kept beside Python's own caches of that code.

To find them, all modules are parsed: two seconds of each start of Snakemake, and of each job of a cluster. Here the
bytes of all files are hashed instead. Whatever is in the way, a damaged file or a read-only folder, costs time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

Found = tuple[str, dict[str, str]]
"""Fingerprint, and the packages of others with their pinned versions."""


class Remembered:
    """What was found for the code as it is."""

    def __init__(self, scripts: Path, others: Iterable[Path] = ()) -> None:
        """Args: scripts: the folder of all code. others: files that decide as well."""
        self._file = scripts / "__pycache__" / "fingerprints.json"
        code = (file for file in scripts.rglob("*.py") if file.is_file() and not file.name.startswith("."))
        self._code = _digest(scripts, [*sorted(code), *others])
        self._found = self._read()

    def get(self, key: Iterable[object], find: Callable[[], Found]) -> Found:
        """What was found before by this key, or what is found now."""
        name = json.dumps(list(key))
        if name not in self._found:
            self._found[name] = find()
            if not sys.dont_write_bytecode:
                self._write()
        return self._found[name]

    def _read(self) -> dict[str, Found]:
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            if kept["code"] != self._code:
                return {}
            return {name: (str(digest), dict(packages)) for name, (digest, packages) in kept["found"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _write(self) -> None:
        """Whole or not at all; of several processes that write, one wins."""
        written = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(exist_ok=True)
            written.write_text(json.dumps({"code": self._code, "found": self._found}), encoding="utf-8")
            written.replace(self._file)


def _digest(scripts: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(scripts) if file.is_relative_to(scripts) else file.name
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
