"""The next batch prepared while the present one is used."""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_CHECK_SECONDS = 0.1  # how long a thread takes to notice that its work is not wanted any more


@dataclass(frozen=True)
class _Ready(Generic[T]):
    item: T


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """Yield the same items; a thread prepares them while the one before is used.

    At most two are held: one that waits and one in preparation. The first is prepared by the
    caller's thread, so that the processes it starts are children of a thread that lives on.

    Args:
        items: closed at the end, and when this generator is closed.

    Raises:
        BaseException: what preparing an item raised, in its place.
    """
    preparation = _Preparation(items)
    try:
        first = next(items, None)
        if first is None:
            return
        preparation.start()
        yield first
        while not isinstance(found := preparation.ready.get(), _Ended):
            yield found.item
        if found.error is not None:
            raise found.error
    finally:
        preparation.stop()
        items.close()


class _Preparation(Generic[T]):
    """The thread, and what it hands over."""

    def __init__(self, items: Generator[T, None, None]) -> None:
        self.ready: queue.Queue[_Ready[T] | _Ended] = queue.Queue(maxsize=1)
        self._items = items
        self._unwanted = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._prepare, name="batches ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._unwanted.set()
        if self._thread is not None:
            self._thread.join()

    def _prepare(self) -> None:
        try:
            for item in self._items:
                self._put(_Ready(item))
                if self._unwanted.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            self._put(_Ended(error))
        else:
            self._put(_Ended(None))

    def _put(self, found: _Ready[T] | _Ended) -> None:
        while not self._unwanted.is_set():
            try:
                self.ready.put(found, timeout=_CHECK_SECONDS)
            except queue.Full:
                continue
            return
