"""One thread that computes for everyone: requests of one head that wait together run together."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Final

from dsu.serving.heads import Answer, Asked, ServedHead

__all__ = ["Batcher"]

_DRAWING: Final = 4
"""Threads that decode images and encode pictures."""

_END: Final = 5.0
"""Seconds for which the batch in work is waited for when the server ends."""


@dataclass(frozen=True, eq=False)
class _Task:
    head: ServedHead
    asked: Asked
    answer: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Answers requests in the order in which they came, several of a head at once. It is open inside a `with`.

    Args:
        size: the most images of a batch.
        pixels: the most of a batch, all images together; a single image may have more.
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
            self._thread.join(_END)  # a batch of a large network takes minutes on a processor: nobody waits for it
        while self._waiting:
            self._waiting.popleft().answer.cancel()

    @property
    def works(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, head: ServedHead, asked: Asked) -> "Future[Answer]":
        """What comes of a request, when it does; one that is cancelled before its turn is not computed."""
        task = _Task(head, asked)
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()
        return task.answer

    def _work(self) -> None:
        with ThreadPoolExecutor(_DRAWING, thread_name_prefix="draw") as pool:
            while True:
                batch = self._next()
                if batch is None:
                    return
                wanted = [task for task in batch if task.answer.set_running_or_notify_cancel()]
                if wanted:
                    _answer(wanted, pool)

    def _next(self) -> list[_Task] | None:
        """The longest waiting request and others of its head, as many as fit; None when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            if not self._open:
                return None
            head, batch, rest, pixels = self._waiting[0].head, list[_Task](), deque[_Task](), 0
            for task in self._waiting:
                fits = not batch or (len(batch) < self._size and pixels + task.asked.image.pixels <= self._pixels)
                if task.head is head and fits:
                    batch.append(task)
                    pixels += task.asked.image.pixels
                else:
                    rest.append(task)
            self._waiting = rest
            return batch


def _answer(batch: list[_Task], pool: ThreadPoolExecutor) -> None:
    answers: Sequence[Answer | Exception]
    try:
        answers = batch[0].head.answers([task.asked for task in batch], pool)
    except Exception as error:  # whatever it is, each of them is to hear of it, and the next batch is to be computed
        answers = [error] * len(batch)
    for task, answer in zip(batch, answers, strict=True):
        if isinstance(answer, Exception):
            task.answer.set_exception(answer)
        else:
            task.answer.set_result(answer)
