"""The one thread on which the model is loaded and every step runs, and the step stream it answers to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class ComputeThread:
    """Runs what it is given, one after another. One thread for all of it, because thread pools of kernels belong to their caller."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def post(self, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, after all that was posted before."""
        self._work.put(work)

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` after all that was posted before, and return or raise what it does."""
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                answer.put((work(), None))
            except BaseException as error:  # carried to the caller's thread, whatever it is
                answer.put((None, error))

        self.post(run)
        value, error = answer.get()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _run(self) -> None:
        while True:
            self._work.get()()
