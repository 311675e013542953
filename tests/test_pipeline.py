"""Steps that overlap: order, bounds, errors, and what is counted."""

import threading
import time
from collections.abc import Generator

import pytest

from halfbit.pipeline import Profile, ahead


def test_items_come_in_order_through_several_threads() -> None:
    def numbers() -> Generator[int, None, None]:
        yield from range(50)

    def squares() -> Generator[int, None, None]:
        for n in ahead(numbers(), Profile(), "numbers"):
            yield n * n

    assert list(ahead(squares(), Profile(), "squares")) == [n * n for n in range(50)]


def test_one_item_is_made_while_one_is_in_use_and_no_more() -> None:
    begun: list[int] = []
    second = threading.Event()

    def numbers() -> Generator[int, None, None]:
        for n in range(5):
            begun.append(n)
            if n == 1:
                second.set()
            yield n

    steps = ahead(numbers(), Profile(), "")
    assert next(steps) == 0
    assert second.wait(5)  # the next is made although nobody asked for it
    time.sleep(0.05)
    assert begun == [0, 1]
    assert list(steps) == [1, 2, 3, 4]


def test_what_making_an_item_raises_is_raised_at_its_turn() -> None:
    def two() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    steps = ahead(two(), Profile(), "")
    assert [next(steps), next(steps)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


def test_closing_waits_for_the_thread_and_closes_what_it_reads() -> None:
    closed: list[str] = []

    def numbers() -> Generator[int, None, None]:
        try:
            yield 0
            time.sleep(0.05)
            yield 1
            yield 2
        finally:
            closed.append(threading.current_thread().name)

    steps = ahead(numbers(), Profile(), "")
    next(steps)
    steps.close()
    assert closed == ["MainThread"]
    assert not [t for t in threading.enumerate() if t.name.startswith("halfbit-ahead")]


def test_what_the_reader_waits_is_counted() -> None:
    def slow() -> Generator[int, None, None]:
        for n in range(3):
            time.sleep(0.05)
            yield n

    profile = Profile()
    for _ in ahead(slow(), profile, "waiting"):
        with profile("using"):
            time.sleep(0.01)
    assert profile.seconds["waiting"] > 0.1
    assert profile.seconds["using"] > 0.02
