"""Tasks by number in worker processes that never outlive the one who asks."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from bigsimclr.data.processes import die_with_parent
from bigsimclr.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_tasks(
    task: Callable[[Job, int], Result],
    job: Job,
    numbers: Iterable[int],
    *,
    workers: int,
    closed: tuple[int, ...] = (),
) -> Iterator[Result]:
    """Yield `task(job, number)` for every number, as they come to be done.

    Args:
        task: a function of a module.
        job: what all tasks share; workers inherit it by fork.
        numbers: one for each task.
        workers: processes; with 1 all is done here.
        closed: descriptors that a worker must not keep open.

    Raises:
        DataError: a worker died.
        Exception: what a task raised; tasks that were begun are finished first.
    """
    waiting = iter(numbers)
    if workers <= 1:
        for number in waiting:
            yield task(job, number)
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
        initargs=(job, closed),
    ) as processes:
        # Few at a time, so that an error does not have to wait for all the others.
        running: set[Future[Result]] = set()
        try:
            while True:
                for number in itertools.islice(waiting, 2 * workers - len(running)):
                    running.add(processes.submit(_run, task, number))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for finished in done:
                    yield finished.result()
        except BrokenProcessPool:
            raise DataError("a worker process died; usually there was too little memory") from None
        finally:
            processes.shutdown(wait=False, cancel_futures=True)


_job: object = None  # of a worker process


def _start(job: object, closed: tuple[int, ...]) -> None:
    global _job  # noqa: PLW0603 - the one place where a worker can keep what it inherits
    _job = job
    for descriptor in closed:
        os.close(descriptor)
    die_with_parent()
    # The one who asks decides when to stop, and Ctrl-C reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(task: Callable[[Job, int], Result], number: int) -> Result:
    return task(_job, number)  # type: ignore[arg-type]  # what `run_tasks` was given
