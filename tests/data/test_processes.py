import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from bigsimclr.data.processes import in_processes
from bigsimclr.errors import DataError


def squares(number: int) -> int:
    return number * number


def refused(number: int, reason: str) -> int:
    raise AssertionError(f"{number}: {reason}")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 200])
def test_each_number_is_worked_on_once(workers: int, count: int) -> None:
    found = list(in_processes(squares, count, workers=workers, on_death=refused))
    assert sorted(found) == [(number, number * number) for number in range(count)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_number_that_kills_its_process_is_named_and_the_others_are_done(how: int) -> None:
    deadly = {5, 40, 41, 63, 99}

    def work(number: int) -> int:
        if number in deadly:
            # What core dumps there might be are not for here.
            os.kill(os.getpid(), how) if how == signal.SIGKILL else os._exit(7)
        return number

    reasons: dict[int, str] = {}

    def on_death(number: int, reason: str) -> int:
        reasons[number] = reason
        return -1

    found = list(in_processes(work, 100, workers=2, on_death=on_death))
    assert sorted(found) == [(number, -1 if number in deadly else number) for number in range(100)]
    assert reasons.keys() == deadly
    what = "by SIGKILL" if how == signal.SIGKILL else "with exit code 7"
    assert set(reasons.values()) == {f"ended 2 processes that read it, {what}"}
    assert not multiprocessing.active_children()


def test_processes_killed_from_outside_are_replaced(tmp_path: Path) -> None:
    def work(number: int) -> int:
        # Each process kills itself at its first number beyond 20: each at another one.
        mark = tmp_path / str(number)
        if number % 20 == 19 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    found = Counter(in_processes(work, 300, workers=3, on_death=refused))
    assert found == Counter((number, number) for number in range(300))
    assert len(list(tmp_path.iterdir())) == 15


def test_processes_that_cannot_work_at_all_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigsimclr.data.processes.die_with_parent", lambda: os._exit(3))
    with pytest.raises(DataError, match=r"die again and again, last with exit code 3: is there"):
        list(in_processes(squares, 10, workers=1, on_death=refused))
    assert not multiprocessing.active_children()


def test_exceptions_are_raised_where_the_work_was_asked_for() -> None:
    def work(number: int) -> int:
        if number == 44:
            raise DataError("number 44 is bad")
        return number

    for workers in (0, 2):
        with pytest.raises(DataError, match=r"^number 44 is bad$"):
            list(in_processes(work, 100, workers=workers, on_death=refused))
    assert not multiprocessing.active_children()


def test_work_that_is_left_early_ends_its_processes() -> None:
    stream = in_processes(squares, 100_000, workers=2, on_death=refused)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()
