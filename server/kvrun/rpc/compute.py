"""The one thread on which the model is loaded and every step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class ComputeThread:
    """Runs what it is given, one after another. One thread for all of it, because thread pools of kernels belong to their caller."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="landing")  # starts with the first that waits
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def post(self, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, after all that was posted before."""
        self._work.put(work)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` after all that was posted before; what it returns or raises."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(work())
            except BaseException as error:  # carried to the caller, whatever it is
                answer.set_exception(error)

        self.post(run)
        return answer

    def after(self, wait: Callable[[], None], work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, once `wait` has returned on another thread; this one goes on meanwhile.

        `work` is run all the same where `wait` raises: it meets what was waited for, and the error with it.
        """

        def waited() -> None:
            with suppress(Exception):
                wait()
            self.post(work)

        self._waiting.submit(waited)

    def _run(self) -> None:
        while True:
            self._work.get()()
