"""The hub: what is asked for, and one clear message for each way to fail."""

from pathlib import Path
from unittest.mock import MagicMock

import pytest
from datasets import Dataset, DatasetDict, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors

from lowrank.config.sources import HubSource
from lowrank.errors import RankwiseError
from lowrank.sources import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = HubSource(hub="some-org/some-model", revision=COMMIT, split="train")


def raising(error: BaseException, cause: BaseException | None = None) -> object:
    def call(*_: object, **__: object) -> None:
        raise error from cause

    return call


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind("Bearer hf_abcdefghijkl was refused", response=MagicMock(status_code=status))


CASES = {
    "gated": (http_error(errors.GatedRepoError, 403), None, r"Accept its licence.*hf auth login.*HF_TOKEN"),
    "missing": (http_error(errors.RepositoryNotFoundError, 404), None, "no such repository, or it is private"),
    "revision": (http_error(errors.RevisionNotFoundError, 404), None, "no such revision"),
    "offline": (errors.OfflineModeIsEnabled("offline"), None, "cannot be reached.*`path:`"),
    "not cached": (errors.LocalEntryNotFoundError("x"), None, "cannot be reached"),
    "no network": (ConnectionError("Couldn't reach it"), OSError("refused"), "cannot be reached"),
    "wrapped gated": (DatasetNotFoundError("x"), http_error(errors.GatedRepoError, 403), "Accept its licence"),
    "wrapped revision": (DatasetNotFoundError("x"), http_error(errors.RevisionNotFoundError, 404), "no such revision"),
    "data set missing": (DatasetNotFoundError("x"), None, "no such repository"),
    "server": (http_error(errors.HfHubHTTPError, 500), None, "cannot be loaded .HfHubHTTPError"),
    "split": (ValueError('Unknown split "train". Should be one of ["test"].'), None, "Unknown split"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["model", "data set"])
def test_each_failure_names_repository_revision_and_cure(
    case: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    error, cause, expected = CASES[case]
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(error, cause))
    monkeypatch.setattr("datasets.load_dataset_builder", raising(error, cause))
    with pytest.raises(RankwiseError, match=expected) as caught:
        hub.fetch_snapshot(SOURCE) if kind == "model" else hub.load_rows(SOURCE)
    message = str(caught.value)
    assert "some-org/some-model" in message
    assert COMMIT in message
    assert "hf_abcdefghijkl" not in message


def test_a_snapshot_asks_for_safetensors_and_never_for_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    asked: dict[str, object] = {}

    def snapshot(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.fetch_snapshot(SOURCE) == [tmp_path / "config.json"]
    assert asked["repo"] == "some-org/some-model"
    assert asked["revision"] == COMMIT
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    assert all(map(wanted, ("model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt")))
    assert not any(map(wanted, ("pytorch_model.bin", "consolidated.00.pth", "x.pt", "modeling_x.py", "x.gguf")))


@pytest.mark.parametrize(
    ("file", "taken"),
    [
        ("a.gguf", ["a.gguf"]),
        ("original/a.gguf", ["original/a.gguf"]),
        (None, ["config.json", "model.safetensors"]),
    ],
)
def test_what_was_fetched_before_is_not_taken_too(
    file: str | None, taken: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All files of a revision lie in one folder of the hub's cache."""
    for name in ("a.gguf", "b.gguf", "config.json", "model.safetensors", "original/config.json", "original/a.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    asked: dict[str, object] = {}

    def snapshot(repo: str, **options: object) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = hub.fetch_snapshot(SOURCE.model_copy(update={"file": file}))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == taken
    assert asked["ignore_patterns"] == (None if file else ["*/*"])
    assert asked["allow_patterns"] == ([file] if file else list(hub.CHECKPOINT_FILES))


def test_a_snapshot_without_the_file_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(RankwiseError, match=r"no file matches x\.gguf"):
        hub.fetch_snapshot(SOURCE.model_copy(update={"file": "x.gguf"}))


class Builder:
    """What the library makes of a data set: its rows of a commit."""

    def __init__(self, rows: object, commit: str = COMMIT) -> None:
        self.rows, self.hash, self.asked = rows, commit, dict[str, object]()

    def __call__(self, repo: str, **options: object) -> "Builder":
        self.asked.update(options, repo=repo)
        return self

    def download_and_prepare(self) -> None:
        self.asked["prepared"] = True

    def as_dataset(self, split: str | None) -> object:
        self.asked["split"] = split
        return self.rows


def test_rows_are_asked_for_with_subset_split_revision_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(Dataset.from_dict({"text": ["a"]}))
    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    source = HubSource(hub="o/d", revision=COMMIT, subset="en", split="train", file="en/part-0.json.gz")
    assert hub.load_rows(source) is builder.rows
    assert builder.asked == {
        "repo": "o/d",
        "name": "en",
        "split": "train",
        "revision": COMMIT,
        "data_files": "en/part-0.json.gz",
        "prepared": True,
    }


def test_a_data_set_without_a_chosen_split_lists_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr("datasets.load_dataset_builder", Builder(DatasetDict(train=rows, test=rows)))
    with pytest.raises(RankwiseError, match="choose a `split:`; there are: train, test"):
        hub.load_rows(SOURCE)


@pytest.mark.parametrize("commit", [COMMIT, "f" * 40])
def test_rows_of_another_revision_are_not_taken_from_the_cache(
    commit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the hub the library itself takes what was cached last, whatever revision it is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache/some-org___some-model/default/0.0.0" / commit
    rows = Dataset.from_dict({"text": ["cached"]})
    rows.info.dataset_name, rows.info.config_name = "some-model", "default"
    rows.info.splits = SplitDict({"train": SplitInfo("train", num_examples=1, dataset_name="some-model")})
    rows.info.write_to_directory(cached.mkdir(parents=True) or str(cached))
    with ArrowWriter(path=str(cached / "some-model-train.arrow"), features=rows.features) as writer:
        writer.write({"text": "cached"})
        writer.finalize()
    if commit == COMMIT:
        assert hub.load_rows(SOURCE)["text"][:] == ["cached"]
    else:
        with pytest.raises(RankwiseError, match=f"at revision {COMMIT}: it is not in the hub's cache on this machine"):
            hub.load_rows(SOURCE)


def test_a_local_folder_of_the_same_name_is_not_taken_for_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org" / "some-model").mkdir(parents=True)
    with pytest.raises(RankwiseError, match="there is a folder of this name here"):
        hub.load_rows(SOURCE)
