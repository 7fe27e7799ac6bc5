"""Sources of the Hugging Face hub. The place of the downloads, the token and mirrors are the hub client's own settings.

The clients keep what they fetch in their own cache (HF_HOME), so a model that is there already is not fetched again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.config.sources import HubSource
from lowrank.errors import RankwiseError
from lowrank.files import LEGAL_FILES
from lowrank.redact import without_secrets

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# Weights as safetensors only (a pickle can run code). Of a repository with one file and an index, both are fetched.
CHECKPOINT_FILES = ("model*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *LEGAL_FILES)


def fetch_snapshot(source: HubSource) -> list[Path]:
    """The files of a model repository at its pinned revision: `source.file`, or a checkpoint and its tokenizer.

    Args:
        source: the repository.

    Raises:
        RankwiseError: gated, missing, or not reachable; it names the repository, the revision and what to do.
    """
    from huggingface_hub import snapshot_download

    patterns = [source.file] if source.file else list(CHECKPOINT_FILES)
    log.info("fetching the model %s at %s from the hub", source.hub, source.revision)
    try:
        folder = snapshot_download(
            source.hub,
            revision=source.revision,
            allow_patterns=patterns,
            ignore_patterns=None if source.file else ["*/*"],
        )
    except Exception as error:  # the client's own types and those of its HTTP library
        raise RankwiseError(_message(source, error)) from error
    files = _matching(Path(folder), patterns)
    if not source.file:
        files = [file for file in files if file.parent == Path(folder)]
    if not files:
        raise RankwiseError(f"hub: {source.hub} at {source.revision}: no file matches {', '.join(patterns)}.")
    return files


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a repository; its folder also holds what was fetched from this revision before."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and any(fnmatch(file.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    )


def fetch_files(source: HubSource) -> list[Path]:
    """The files of a data set that `source.file` names, as they lie in the repository at its pinned revision.

    Nothing else of the repository is fetched or looked at, so this also reads one that has a loading script.

    Raises:
        RankwiseError: gated, missing, or not reachable, no such file, or a split or subset is chosen besides; it names
            the repository, the revision and what to do.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    pattern = source.file
    assert pattern is not None
    if source.split or source.subset:
        raise RankwiseError(f"hub: {source.hub}: `file:` says what is read; leave out `split:` and `subset:`.")
    log.info("fetching %s of the data set %s at %s from the hub", pattern, source.hub, source.revision)
    try:
        if not any(sign in pattern for sign in "*?["):  # one file needs no list of all, which is long for large sets
            return [Path(hf_hub_download(source.hub, pattern, repo_type="dataset", revision=source.revision))]
        folder = Path(
            snapshot_download(source.hub, repo_type="dataset", revision=source.revision, allow_patterns=[pattern])
        )
    except Exception as error:  # the client's own types and those of its HTTP library
        raise RankwiseError(_message(source, error)) from error
    files = _matching(folder, [pattern])
    if not files:
        raise RankwiseError(f"hub: {source.hub} at {source.revision}: no file matches {pattern}.")
    return files


def load_rows(source: HubSource) -> Dataset:
    """The rows of one split of a data set at its pinned revision.

    Raises:
        RankwiseError: gated, missing, not reachable, or no split is chosen; it names the repository, the revision
            and what to do.
    """
    from datasets import Dataset, load_dataset_builder

    if Path(source.hub).exists():
        raise RankwiseError(
            f"hub: {source.hub}: there is a folder of this name here, and the data sets library would read it instead "
            "of the hub. Rename it, or use `path:`."
        )
    log.info("loading the data set %s at %s from the hub", source.hub, source.revision)
    try:
        builder = load_dataset_builder(source.hub, name=source.subset, revision=source.revision, data_files=source.file)
        # Where the hub does not answer, the library takes what was last cached of the data set, whatever its revision.
        if builder.hash != source.revision:
            raise ConnectionError(f"the cache holds {builder.hash} of it")
        builder.download_and_prepare()
        rows = builder.as_dataset(split=source.split)
    except Exception as error:  # the library raises a dozen types, from ValueError to the HTTP client's
        raise RankwiseError(_message(source, error)) from error
    if not isinstance(rows, Dataset):
        raise RankwiseError(f"hub: {source.hub}: choose a `split:`; there are: {', '.join(map(str, rows))}.")
    return rows


def _message(source: HubSource, error: BaseException) -> str:
    place = f"hub: {source.hub} at revision {source.revision}"
    kinds = {type_.__name__ for cause in _causes(error) for type_ in type(cause).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"{place}: access is restricted. Accept its licence on its page of the hub, then `hf auth login` "
            "(or set HF_TOKEN) and run the workflow again."
        )
    if "RevisionNotFoundError" in kinds:
        return f"{place}: the repository has no such revision. Take the commit's 40 digits from its page of the hub."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"{place}: there is no such repository, or it is private. Check the spelling; for a private one "
            "`hf auth login` (or set HF_TOKEN) first."
        )
    if kinds & {"OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError", "TransportError", "Timeout"}:
        return (
            f"{place}: it is not in the hub's cache on this machine, and the hub cannot be reached. Go online "
            "(and unset HF_HUB_OFFLINE), or point `path:` at a copy."
        )
    if "EntryNotFoundError" in {type_.__name__ for type_ in type(error).__mro__}:  # as a cause, it may be a mere probe
        return f"{place}: it has no file `{source.file}`. Take the file's path from its page of the hub."
    return f"{place}: cannot be loaded ({type(error).__name__}: {without_secrets(str(error))})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and all that led to it; the libraries wrap the telling one."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
