"""Keeping access tokens and passwords out of logs and messages."""

from __future__ import annotations

import logging
import os
import re

HIDDEN = "***"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SHORTEST = 6  # a shorter value of such a variable would blacken words of ordinary text
_PATTERNS = (
    re.compile(r"\bhf_[A-Za-z0-9]{10,}"),
    re.compile(r"(?<=Bearer )[^\s\"']+", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s]+(?=@)"),  # user and password of a URL
)


def without_secrets(text: str) -> str:
    """The text without tokens of the hub, whatever the environment names as such, and passwords of URLs."""
    for value in filter(None, map(os.environ.get, SECRET_VARIABLES)):
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(HIDDEN, text)
    return text


class SafeFormatter(logging.Formatter):
    """Formats log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return without_secrets(super().format(record))
