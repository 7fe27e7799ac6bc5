"""The order of what is written beside the computing, what a failure stops, and how far a reader is ahead."""

from __future__ import annotations

import threading
import time

import pytest

from lowrank.jobs.beside import WAITING, Writer, read_ahead


def test_all_is_done_in_order_by_another_thread_at_the_end_of_the_block() -> None:
    done: list[tuple[int, int]] = []

    def piece(number: int) -> None:
        time.sleep(0.01 * (number == 0))
        done.append((number, threading.get_ident()))

    with Writer() as writer:
        for number in range(6):
            writer.do(lambda number=number: piece(number))
    assert [number for number, _ in done] == list(range(6))
    assert {thread for _, thread in done}.isdisjoint({threading.get_ident()})


def test_few_pieces_wait() -> None:
    go, given = threading.Event(), []

    def give() -> None:
        with Writer() as writer:
            for number in range(5):
                writer.do(go.wait)
                given.append(number)

    thread = threading.Thread(target=give)
    thread.start()
    deadline = time.monotonic() + 60
    while len(given) < 1 + WAITING and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(given) == 1 + WAITING  # one is being done
    go.set()
    thread.join()
    assert len(given) == 5


def test_after_a_failure_nothing_is_done_and_who_gave_it_is_told() -> None:
    done: list[str] = []

    def write() -> None:
        with Writer() as writer:
            writer.do(lambda: _fail(OSError("disk")))
            writer.do(lambda: done.append("what says that it is finished"))

    with pytest.raises(OSError, match="disk"):
        write()
    assert not done


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_of_the_block_itself_is_the_one_that_is_told_and_what_was_given_is_done(fails: bool) -> None:
    done: list[int] = []

    def write() -> None:
        with Writer() as writer:
            writer.do(lambda: time.sleep(0.1))
            writer.do(lambda: _fail(OSError("disk")) if fails else done.append(1))
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write()
    assert done == ([] if fails else [1])


def test_a_reader_is_so_many_pieces_ahead_and_no_more() -> None:
    read: list[int] = []
    for used in read_ahead(lambda number: read.append(number) or number, range(5)):
        deadline = time.monotonic() + 60
        while len(read) < min(used + 1 + WAITING, 5) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert read == list(range(min(used + 1 + WAITING, 5)))
    assert read == list(range(5))


def test_a_reader_fails_where_its_piece_would_be_used() -> None:
    used: list[int] = []
    with pytest.raises(ZeroDivisionError):
        used.extend(read_ahead(lambda number: 6 // (2 - number), range(4)))
    assert used == [3, 6]


def _fail(error: Exception) -> None:
    raise error
