"""Steps that overlap: each in threads of its own, `ahead` of whoever reads it by one item, or by one for each worker.

    reading -> solving, `spread` over workers -> encoding, running, keeping          one group of experts after another

Memory holds one item in each thread, and the items come in their order, so the result is that of one thread.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
END: Any = object()


class Profile:
    """Seconds of the clock by what they went to. Accumulates.

    Attributes:
        seconds: of the loop itself and, under names of their own, of the steps beside it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What happens inside counts for `name`; of several threads each second of each."""
        begin = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


def ahead(items: Generator[T, None, None], profile: Profile, waiting: str) -> Generator[T, None, None]:
    """`items`, the next of them made in a thread while one is in use; no more than that.

    What making them raises is raised here, when its turn comes. Close it, or use it up: a thread that makes an item is
    waited for, what it makes is dropped.

    Args:
        profile, waiting: what the reader waits is counted, under this name.
    """
    with closing(items), ThreadPoolExecutor(1, "halfbit-ahead") as thread:
        coming = thread.submit(next, items, END)
        while True:
            with profile(waiting):
                item = coming.result()
            if item is END:
                return
            coming = thread.submit(next, items, END)
            yield item
            # or it would live until the next one is there
            del item


def spread(
    items: Generator[T, None, None], work: Callable[[int, T], R], workers: int, profile: Profile, waiting: str
) -> Generator[R, None, None]:
    """`work(worker, item)` of each item, in order; worker i takes every `workers`-th item from the i-th on.

    While the reader has one result, each worker has one item at hand. Errors, closing and counting are as of `ahead`.
    """
    with closing(items), ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1, f"halfbit-worker-{i}")) for i in range(workers)]
        coming: deque[Future[R]] = deque()

        def next_result() -> R:
            with profile(waiting):
                return coming.popleft().result()

        for number, item in enumerate(items):
            coming.append(threads[number % workers].submit(work, number % workers, item))
            del item
            if len(coming) > workers:
                yield next_result()
        while coming:
            yield next_result()
