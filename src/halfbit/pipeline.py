"""Steps that overlap: a step is a generator in a thread of its own, one item ahead of whoever reads it.

    reading -> solving -> encoding, running, keeping          each `ahead` of the next by one group of experts

Memory holds one item in each step, and the items come in their order, so what is computed is what one thread computes.
"""

import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
END: Any = object()


class Profile:
    """Seconds of the clock by what they went to. Accumulates.

    Attributes:
        seconds: of the loop itself and, under names of their own, of the steps beside it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What happens inside counts for `name`. A name belongs to one thread."""
        begin = time.monotonic()
        try:
            yield
        finally:
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
