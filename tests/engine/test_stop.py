"""Stop requests: signals set a flag, and nothing else."""

import os
import signal
import threading
from collections.abc import Sequence
from functools import partial

import pytest

from bigsimclr.engine.stop import STOP_SIGNALS, StopRequest
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks


def send(number: int) -> None:
    """Signal this process; Python has run the handler when this returns."""
    signal.raise_signal(number)


def fail_after(number: int) -> None:
    with StopRequest():
        send(number)
        raise ZeroDivisionError


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_is_noted_by_name(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        send(number)
        assert stop.received == number.name
    assert stop.received == number.name


def test_the_gravest_signal_counts_whichever_came_first() -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR2)
        assert stop.agree(ALONE) == stop.received == "SIGUSR2"
        send(signal.SIGTERM)
        assert stop.agree(ALONE) == stop.received == "SIGTERM"
        send(signal.SIGUSR2)
        assert stop.agree(ALONE) == stop.received == "SIGTERM"


def agree_twice(
    world: World, arrived: Sequence[signal.Signals | None]
) -> tuple[str | None, str | None, str | None]:
    stop = StopRequest()
    before = stop.agree(world)
    own = arrived[world.rank]
    if own is not None:
        stop._note(own, None)
    return before, stop.agree(world), stop.received


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrived", "gravest"),
    [
        ((signal.SIGUSR2, None, signal.SIGTERM), "SIGTERM"),
        ((None, signal.SIGUSR2, signal.SIGINT), "SIGINT"),
        ((None, None, signal.SIGUSR2), "SIGUSR2"),
        ((None, None, None), None),
    ],
)
def test_ranks_agree_on_the_gravest_signal(
    arrived: Sequence[signal.Signals | None], gravest: str | None
) -> None:
    found = on_ranks(3, partial(agree_twice, arrived=arrived))
    assert found == [(None, gravest, gravest)] * 3


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.received == "SIGTERM"


def test_the_earlier_handlers_come_back() -> None:
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    previous = signal.signal(signal.SIGUSR2, lambda number, _: noted.append(number))
    try:
        with pytest.raises(ZeroDivisionError):
            fail_after(signal.SIGUSR2)
        assert noted == []
        send(signal.SIGUSR2)
        assert noted == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_requests_nest() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            send(signal.SIGTERM)
        assert (outer.received, inner.received) == (None, "SIGTERM")
        send(signal.SIGINT)
        assert outer.received == "SIGINT"


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[object] = []

    def run() -> None:
        with StopRequest() as stop:
            found.extend([signal.getsignal(number) for number in STOP_SIGNALS])
            found.append(stop.received)

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [*before, None]


def test_a_system_call_goes_on_after_the_signal() -> None:
    reader, writer = os.pipe()
    with StopRequest() as stop:
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM))
        late = threading.Timer(0.1, lambda: os.write(writer, b"x"))
        timer.start()
        late.start()
        assert os.read(reader, 1) == b"x"
        assert stop.received == "SIGTERM"
        timer.join()
        late.join()
    os.close(reader)
    os.close(writer)
