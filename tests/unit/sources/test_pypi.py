"""Packages: verified before unpacking, reused, and unpacked only where they should be."""

import hashlib
import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.config.sources import PathSource, PypiSource
from lowrank.errors import RankwiseError
from lowrank.sources import archives, pypi
from lowrank.sources.resolve import placed, source_files

WHEEL = {
    "tinytexts/data/a.txt": "first",
    "tinytexts/data/b.txt": "second",
    "tinytexts/readme.md": "about",
    "tinytexts-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinytexts\nVersion: 1.0\n",
    "tinytexts-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tinytexts-1.0.dist-info/RECORD": "",
}
# A build backend inside the distribution: pip asks it for metadata without fetching anything. It leaves a trace.
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path({trace!r}).write_text("ran")
    info = pathlib.Path(folder, "tinysrc-2.0.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: tinysrc\\nVersion: 2.0\\n")
    return info.name
def build_wheel(*args):
    raise RuntimeError("never built")
"""


def make_wheel(folder: Path, files: dict[str, str] = WHEEL, name: str = "tinytexts-1.0-py3-none-any.whl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return folder / name


def make_sdist(folder: Path, files: dict[str, str], name: str = "tinysrc-2.0.tar.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w:gz") as tar:
        for path, text in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return folder / name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_of(path: Path, file: str = "*.txt", sdist: bool = False, digest: str | None = None) -> PypiSource:
    name, version = path.name.split("-")[:2]
    return PypiSource(
        pypi=f"{name}=={version.removesuffix('.tar.gz')}", sha256=digest or sha256(path), file=file, sdist=sdist
    )


@pytest.fixture
def offline_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real pip, with the user's settings replaced by ours, takes for its index."""
    for name in ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def answer(returncode: int, output: str, file: tuple[str, bytes] | None = None) -> Callable[..., object]:
    """A stand-in for `run_pip` that prints, ends and perhaps leaves a file."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        if file:
            destination = Path(arguments[arguments.index("--dest") + 1])
            destination.mkdir()
            (destination / file[0]).write_bytes(file[1])
        return subprocess.CompletedProcess(arguments, returncode, stdout=output)

    return run


def no_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    raise AssertionError(f"pip was called: {arguments}")


def test_pip_fetches_a_wheel_and_the_cache_serves_it_again(
    offline_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(make_wheel(offline_index))
    file = pypi.download(source, tmp_path / "cache")
    assert file.parent == tmp_path / "cache" / "packages"
    assert sha256(file) == source.sha256
    monkeypatch.setattr(pypi, "run_pip", no_pip)
    assert pypi.download(source, tmp_path / "cache") == file


def test_pip_fetches_a_source_distribution(offline_index: Path, tmp_path: Path) -> None:
    sdist = make_sdist(offline_index, sdist_files(tmp_path / "trace"))
    source = source_of(sdist, "data/*.txt", sdist=True)
    with source_files(source, tmp_path / "cache") as files:
        assert [file.read_text() for file in files] == ["from the source"]
    assert not files[0].exists()  # unpacked for the time of the block only


def test_wrong_hash_stops_before_any_code_of_the_package_runs(offline_index: Path, tmp_path: Path) -> None:
    sdist = make_sdist(offline_index, sdist_files(tmp_path / "trace"))
    wrong = "0" * 64
    with pytest.raises(RankwiseError) as caught:
        pypi.download(source_of(sdist, sdist=True, digest=wrong), tmp_path / "cache")
    message = str(caught.value)
    assert "tinysrc==2.0" in message
    assert wrong in message
    assert sha256(sdist) in message
    assert "config" in message
    assert not (tmp_path / "trace").exists()
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def sdist_files(trace: Path) -> dict[str, str]:
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    return {
        "tinysrc-2.0/pyproject.toml": project,
        "tinysrc-2.0/backend.py": BACKEND.format(trace=str(trace)),
        "tinysrc-2.0/PKG-INFO": "Metadata-Version: 2.1\nName: tinysrc\nVersion: 2.0\n",
        "tinysrc-2.0/data/x.txt": "from the source",
    }


def test_a_file_that_pip_let_pass_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "run_pip", answer(0, "", ("tinytexts-1.0-py3-none-any.whl", b"other")))
    source = source_of(make_wheel(tmp_path / "index"))
    with pytest.raises(RankwiseError, match=hashlib.sha256(b"other").hexdigest()):
        pypi.download(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_damaged_cached_file_is_replaced(offline_index: Path, tmp_path: Path) -> None:
    source = source_of(make_wheel(offline_index))
    packages = tmp_path / "cache" / "packages"
    packages.mkdir(parents=True)
    (packages / "tinytexts-1.0-py3-none-any.whl").write_bytes(b"half")
    assert sha256(pypi.download(source, tmp_path / "cache")) == source.sha256


def test_failed_download_shows_pips_last_lines_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "\n".join([*(f"line {n}" for n in range(30)), "ERROR: https://me:secret@mirror/simple is down"])
    monkeypatch.setattr(pypi, "run_pip", answer(1, output))
    with pytest.raises(RankwiseError) as caught:
        pypi.download(source_of(make_wheel(tmp_path / "index")), tmp_path / "cache")
    message = str(caught.value)
    assert "tinytexts==1.0" in message
    assert "is down" in message
    assert "line 29" in message
    assert "line 3\n" not in message
    assert "secret" not in message
    assert "proxy" in message
    assert "`packages`" in message


def test_pip_sees_the_users_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    assert "https://mirror.example/simple" in pypi.run_pip(["config", "debug"]).stdout


def test_unpacking_takes_only_what_matches(tmp_path: Path) -> None:
    files = archives.extract(make_wheel(tmp_path), "tinytexts/data/*", tmp_path / "out")
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == [
        "tinytexts/data/a.txt",
        "tinytexts/data/b.txt",
    ]
    assert [file.read_text() for file in files] == ["first", "second"]
    assert not (tmp_path / "out/tinytexts/readme.md").exists()


def test_a_file_with_brackets_in_its_name_is_found_by_its_name(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {"p/a[1].txt": "x"})
    assert archives.extract(wheel, "p/a[1].txt", tmp_path / "out")[0].read_text() == "x"


def test_paths_of_a_source_distribution_start_below_its_folder(tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path, {"tinysrc-2.0/data/x.txt": "x", "tinysrc-2.0/y.txt": "y"})
    (file,) = archives.extract(sdist, "data/x.txt", tmp_path / "out")
    assert file == tmp_path / "out" / "data" / "x.txt"


@pytest.mark.parametrize("path", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "a\\..\\evil.txt"])
def test_members_never_leave_the_folder(tmp_path: Path, path: str) -> None:
    for archive in (
        make_wheel(tmp_path / "w", {path: "evil"}),
        make_sdist(tmp_path / "s", {f"tinysrc-2.0/{path}": "evil"}),
    ):
        with pytest.raises(RankwiseError, match="leads out of the folder"):
            archives.extract(archive, "*", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_in_an_archive_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t-1.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("t-1/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(RankwiseError, match="no file matches"):
        archives.extract(tmp_path / "t-1.tar.gz", "link.txt", tmp_path / "out")


def test_a_pattern_without_match_names_close_files(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"no file matches `file: tinytexts/dta/a.txt`.*tinytexts/data/a\.txt"):
        archives.extract(make_wheel(tmp_path), "tinytexts/dta/a.txt", tmp_path / "out")


@pytest.mark.parametrize("name", ["x-1.whl", "x-1.tar.gz"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b not an archive")
    with pytest.raises(RankwiseError, match=f"{name}: no readable"):
        archives.extract(tmp_path / name, "*", tmp_path / "out")


def test_too_small_a_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3})())
    with pytest.raises(RankwiseError, match=r"unpacking tinytexts.*MiB are free.*larger disk"):
        archives.extract(wheel, "*", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_path_sources_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with source_files(PathSource(path=str(tmp_path / "x.txt")), tmp_path / "cache") as files:
        assert files == [tmp_path / "x.txt"]


def test_places_are_put_before_messages() -> None:
    with pytest.raises(RankwiseError, match=r"^corpora\.c4: gone$"), placed("corpora.c4"):
        raise RankwiseError("gone")
