"""What tests of several folders share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from lowrank.jobs.forkserver import SERVER
from lowrank.jobs.stage import serve_forks
from tests.warm import REPOSITORY, Warm

settings.register_profile("explore", deadline=None)  # new examples each time: `pytest --hypothesis-profile=explore`
settings.register_profile("usual", settings.get_profile("explore"), derandomize=True)
settings.load_profile("usual")


def pytest_configure() -> None:
    """Started in the background or by `nohup`, pytest ignores signals, and so would all whom tests send them to.

    With a handler that does nothing it goes on ignoring them, and what it starts does not.
    """
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """Python's search for cycles leaves out what is there by now, some million objects: it was 7 % of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that has loaded what stages load, and runs Snakemake."""
    started = Warm()
    yield started
    started.close()


@pytest.fixture(scope="session")
def fork_server() -> str:
    """The server of forks that a run has, for processes that tests start; what it needs loaded it loads once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "workflow_scripts"))
        patch.delenv(SERVER, raising=False)
        serve_forks()
        return os.environ.pop(SERVER, ":")  # for those alone that ask for it; without one, workers load all themselves


@pytest.fixture
def forked_workers(fork_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker processes of a test are its forks: processes of their own as ever, which need load nothing."""
    monkeypatch.setenv(SERVER, fork_server)


@pytest.fixture(autouse=True)
def environment_of_the_tests() -> Iterator[None]:
    """Stages set variables for a process of their own; the next test finds none of them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
