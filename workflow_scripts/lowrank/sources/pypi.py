"""Packages of the Python package index, fetched by the user's own pip with the user's own settings."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock
from packaging.utils import canonicalize_name

from lowrank.config.sources import PypiSource
from lowrank.errors import RankwiseError
from lowrank.files import sha256_file, write_error
from lowrank.redact import without_secrets

log = logging.getLogger(__name__)

SHOWN_LINES = 8


def download(source: PypiSource, cache: Path) -> Path:
    """The verified file of a package in `<cache>/packages`, downloaded if it is not there.

    A file of the cache is used only if its SHA-256 is the pinned one. pip is given the hash too, so it refuses a
    wrong file before it asks a source distribution for its metadata (which runs the package's build code).
    Retries, proxies, mirrors and certificates are pip's own settings.

    Raises:
        RankwiseError: wrong hash, failed download, or a cache that cannot be written; with the cure.
    """
    folder = cache / "packages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Several rules want the same package: the first downloads it, the others wait and find it.
        with FileLock(folder / f".{source.pypi}.lock"):
            return _cached(source, folder) or _fetch(source, folder)
    except OSError as error:
        raise write_error(folder, error) from error


def _cached(source: PypiSource, folder: Path) -> Path | None:
    name = canonicalize_name(source.pypi.partition("==")[0])
    for file in sorted(folder.iterdir()):
        if file.is_file() and canonicalize_name(file.name).startswith(name) and sha256_file(file) == source.sha256:
            return file
    return None


def _fetch(source: PypiSource, folder: Path) -> Path:
    log.info("downloading %s", source.pypi)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        requirement = Path(temporary) / "requirement.txt"
        requirement.write_text(f"{source.pypi} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        files = Path(temporary) / "files"
        kind = ["--no-binary", source.pypi.partition("==")[0]] if source.sdist else ["--only-binary", ":all:"]
        options = ["--no-deps", "--no-input", "--progress-bar", "off", *kind]
        result = run_pip(["download", *options, "--dest", str(files), "--requirement", str(requirement)])
        if result.returncode:
            raise RankwiseError(_failure(source, result.stdout))
        (file,) = files.iterdir()
        found = sha256_file(file)
        if found != source.sha256:
            raise RankwiseError(_wrong_hash(source, found))
        target = folder / file.name
        os.replace(file, target)
    return target


def run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip of this interpreter in the unchanged environment; its two output streams are joined in `stdout`."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _failure(source: PypiSource, output: str) -> str:
    found = re.search(r"Got\s+([0-9a-f]{64})", output)
    if "DO NOT MATCH THE HASHES" in output and found:
        return _wrong_hash(source, found[1])
    lines = [line for line in output.splitlines() if line.strip() and "is ignored: it is neither" not in line]
    shown = without_secrets("\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]))
    return (
        f"{source.pypi}: pip could not download it. pip's last lines:\n{shown}\n"
        "Check the network, the proxy and pip's settings (`pip config list`; PIP_RETRIES and PIP_TIMEOUT help on a "
        "slow line), then run the workflow again. Offline, copy the file into `packages` in the `cache` of the config."
    )


def _wrong_hash(source: PypiSource, found: str) -> str:
    return (
        f"{source.pypi}: wrong sha256 of the downloaded file; it was removed.\n"
        f"  expected {source.sha256}\n  found    {found}\n"
        "If the `sha256` of the config is mistyped, correct it; if not, the index or a proxy delivers another file: do "
        "not use it."
    )
