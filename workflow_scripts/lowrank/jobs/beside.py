"""Reading and writing files beside the computing, each in a thread of its own; a few pieces are held at most."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

WAITING = 1
"""Pieces that wait at most while one is being written, or that are read before they are asked for."""


class Writer:
    """Does pieces of work in the order in which they are given, while who gives them goes on.

    At the end of a `with` block all are done, also if it ends by an error of its own. After one that fails none is done
    any more: so what says that something is finished can be given after it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._left: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def do(self, work: Callable[[], object]) -> None:
        """Have a piece of work done; return once few wait.

        Raises:
            Exception: what an earlier piece raised.
        """
        self._left.append(self._pool.submit(self._do, work))
        while len(self._left) > 1 + WAITING:
            self._left.popleft().result()

    def wait(self) -> None:
        """Return when all is done.

        Raises:
            Exception: what a piece raised.
        """
        while self._left:
            self._left.popleft().result()

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise


def read_ahead(read: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """What is read for each item; the next while the last is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
        pending: deque[Future[Value]] = deque()
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > WAITING:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
