"""In which file, and in which line of it, an error of a config lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank.config.use import KEY, presets_file
from lowrank.config.yaml_file import lines_of

_ENDS = ".:[ "
"""What may follow the YAML path at the beginning of a message."""


class Lines:
    """The lines of a config's files.

    Args:
        files: of the config, the later ones on top of the earlier.
        raw: what they hold together, which may name a file of presets.
    """

    def __init__(self, files: Sequence[str | Path] = (), raw: dict[str, Any] | None = None) -> None:
        self._files, self._raw = files, raw or {}

    @cached_property
    def _places(self) -> dict[str, dict[str, int]]:
        """How a file is called before a line -> YAML path -> line; read only if there is an error."""
        alone = len(self._files) == 1  # its name stands above all errors
        places = {"line" if alone else f"{path}, line": lines_of(path) for path in reversed(self._files)}
        if self._files and KEY in self._raw:
            presets = presets_file(self._raw[KEY], self._files)
            places[f"{presets}, line"] = lines_of(presets)
        return places

    def before(self, message: str) -> str:
        """A message that begins with a YAML path, with the line before it in which that path's key stands.

        Of a key that is missing it is the line of the entry where it should be; nothing if no file has any of it.
        """
        found = [
            (len(place), where, line)
            for where, places in self._places.items()
            for place, line in places.items()
            if message.startswith(place) and message[len(place) : len(place) + 1] in _ENDS
        ]
        if not found:
            return message
        _, where, line = max(found, key=lambda each: each[0])  # of the same place, the first: the study's own
        return f"{where} {line}: {message}"
