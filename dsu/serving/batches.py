"""A thread that computes all requests; waiting requests for the same head run in one batch."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Final

from dsu.serving.heads import Answer, PredictRequest, ServedHead

_IMAGE_THREADS: Final = 4
"""Threads that decode and encode images."""

_EXIT_SECONDS: Final = 5.0
"""Seconds that the server waits for the current batch when it stops."""


@dataclass(frozen=True, eq=False)
class _Task:
    head: ServedHead
    request: PredictRequest
    answer: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Answers requests in their order of arrival, several for one head at once. Runs inside a `with`.

    Args:
        size: maximum number of images in a batch.
        pixels: maximum total number of pixels in a batch; a single image may have more.
    """

    def __init__(self, size: int, pixels: float) -> None:
        self._size, self._pixels = size, pixels
        self._waiting: deque[_Task] = deque()
        self._changed, self._open = Condition(), False
        self._thread: Thread | None = None

    def __enter__(self) -> "Batcher":
        self._open = True
        self._thread = Thread(target=self._work, name="predict", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_EXIT_SECONDS)  # on a CPU, a batch may take minutes: do not wait for its end
        while self._waiting:
            self._waiting.popleft().answer.cancel()

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, head: ServedHead, request: PredictRequest) -> "Future[Answer]":
        """Add a request and return its future answer; a request cancelled before its turn is not computed."""
        task = _Task(head, request)
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()
        return task.answer

    def _work(self) -> None:
        with ThreadPoolExecutor(_IMAGE_THREADS, thread_name_prefix="draw") as pool:
            while True:
                batch = self._next()
                if batch is None:
                    return
                active = [task for task in batch if task.answer.set_running_or_notify_cancel()]
                if active:
                    _answer(active, pool)

    def _next(self) -> list[_Task] | None:
        """The oldest request, and others for its head up to the limits; None once the batcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            head, batch, rest, pixels = self._waiting[0].head, list[_Task](), deque[_Task](), 0
            for task in self._waiting:
                fits = not batch or (len(batch) < self._size and pixels + task.request.image.pixels <= self._pixels)
                if task.head is head and fits:
                    batch.append(task)
                    pixels += task.request.image.pixels
                else:
                    rest.append(task)
            self._waiting = rest
            return batch


def _answer(batch: list[_Task], pool: ThreadPoolExecutor) -> None:
    answers: Sequence[Answer | Exception]
    try:
        answers = batch[0].head.answers([task.request for task in batch], pool)
    except Exception as error:  # every request of the batch gets the error, and the thread goes on with the next batch
        answers = [error] * len(batch)
    for task, answer in zip(batch, answers, strict=True):
        if isinstance(answer, Exception):
            task.answer.set_exception(answer)
        else:
            task.answer.set_result(answer)
