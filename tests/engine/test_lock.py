"""The run directory lock: one holder, freed by any death, and a directory proven writable."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigsimclr.engine import lock
from bigsimclr.engine.lock import hold_run
from bigsimclr.errors import StorageError
from bigsimclr.world import Job

FIRST, SECOND = Job("123", 0), Job("123", 1)


def in_child(action: Callable[[], None]) -> int:
    """Fork; the child's exit code is 0 when `action` returned, 9 when the directory was held."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except StorageError:
        code = 9
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hold_briefly(directory: Path) -> None:
    with hold_run(directory):
        pass


def test_the_directory_is_created_and_left_clean(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "näme 'with' spaces"
    with hold_run(directory):
        signature = json.loads((directory / ".lock").read_text())
        assert len(signature.pop("nonce")) == 16
        assert signature == {"pid": os.getpid(), "host": socket.gethostname()}
        assert {path.name for path in directory.iterdir()} == {".lock", ".lock-turn"}
    hold_briefly(directory)


def test_the_fence_notices_who_took_over_without_a_lock(tmp_path: Path) -> None:
    with hold_run(tmp_path) as fence:
        fence()
        (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}\n')
        with pytest.raises(StorageError, match="taken over by another process"):
            fence()


def test_a_second_holder_is_told_who_holds(tmp_path: Path) -> None:
    expected = f"is in use by process {os.getpid()} on {socket.gethostname()}; use another --out"
    with hold_run(tmp_path):
        with pytest.raises(StorageError, match=expected), hold_run(tmp_path):
            pass
        assert exit_code(in_child(lambda: hold_briefly(tmp_path))) == 9
    assert exit_code(in_child(lambda: hold_briefly(tmp_path))) == 0


def test_an_unsigned_lock_still_refuses(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match="in use by another process"), hold_run(tmp_path):
        pass
    os.close(descriptor)


def test_an_error_inside_frees_the_lock_and_passes_on(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), hold_run(tmp_path):
        raise OSError("mine")
    hold_briefly(tmp_path)


def test_a_kill_frees_the_lock_even_while_a_worker_lives_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hold_and_fork() -> None:
        with hold_run(tmp_path):
            if os.fork() == 0:  # the worker speaks, when it has closed what it inherited
                os.write(writer, os.getpid().to_bytes(8, "big"))
            time.sleep(60)

    holder = in_child(hold_and_fork)
    worker = int.from_bytes(os.read(reader, 8), "big")
    try:
        os.kill(holder, signal.SIGKILL)
        assert exit_code(holder) == -signal.SIGKILL
        hold_briefly(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_of_many_starters_one_wins(tmp_path: Path) -> None:
    start_read, start_write = os.pipe()
    done_read, done_write = os.pipe()

    def race() -> None:
        os.close(start_write)
        os.close(done_write)
        os.read(start_read, 1)
        with hold_run(tmp_path):
            os.read(done_read, 1)

    children = [in_child(race) for _ in range(8)]
    os.close(start_write)  # the end of the pipe starts them all at once
    losers = [exit_code_of_any(children) for _ in range(7)]
    os.close(done_write)
    assert losers == [9] * 7
    assert exit_code_of_any(children) == 0
    os.close(start_read)
    os.close(done_read)


def exit_code_of_any(children: list[int]) -> int:
    while True:
        for child in children:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to .*file: File exists"):
        hold_briefly(tmp_path / "file")


def test_control_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="control characters"):
        hold_briefly(tmp_path / "a\nb")
    assert list(tmp_path.iterdir()) == []


def test_a_link_at_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match="cannot write to"):
        hold_briefly(run)
    assert victim.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="mode bits do not bind the superuser")
def test_a_read_only_directory_is_refused_before_anything_runs(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            hold_briefly(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "unlink"])
def test_a_directory_that_cannot_keep_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=r"cannot write to .*: Read-only file system"):
            hold_briefly(tmp_path)
    hold_briefly(tmp_path)


def test_without_locks_the_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), hold_run(tmp_path):
        assert "without locks" in caplog.text


# --- later starts of the same Slurm job --------------------------------------------------------


def hold_until_told(directory: Path, job: Job, ready: int, told: int) -> None:
    """Hold; when told, publish as a run does: fence, then write."""
    with hold_run(directory, job=job) as fence:
        os.write(ready, b"x")
        os.read(told, 1)
        fence()
        (directory / "result").write_text(str(job.restart))


@contextmanager
def frozen_holder(directory: Path, job: Job) -> Iterator[Callable[[], int]]:
    """Stop a holder in the middle of its work; the call lets it go on, and returns its exit code.

    Like a machine that Slurm has lost sight of.
    """
    ready_read, ready_write = os.pipe()
    told_read, told_write = os.pipe()
    child = in_child(lambda: hold_until_told(directory, job, ready_write, told_read))
    ended = False

    def thaw() -> int:
        nonlocal ended
        os.write(told_write, b"x")
        os.kill(child, signal.SIGCONT)
        ended = True
        return exit_code(child)

    try:
        assert os.read(ready_read, 1) == b"x"
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        yield thaw
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            exit_code(child)
        for end in (ready_read, ready_write, told_read, told_write):
            os.close(end)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_later_start_of_the_job_takes_over_from_a_frozen_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with frozen_holder(tmp_path, FIRST) as thaw:
        earlier = json.loads((tmp_path / ".lock").read_text())
        assert (earlier["job"], earlier["restart"]) == ("123", 0)
        with hold_run(tmp_path, job=SECOND) as fence:
            later = json.loads((tmp_path / ".lock").read_text())
            assert (later["pid"], later["job"], later["restart"]) == (os.getpid(), "123", 1)
            fence()
            (tmp_path / "result").write_text("1")
            before = contents(tmp_path)
            assert thaw() == 9
            assert contents(tmp_path) == before
            fence()
    assert f"is taken over from process {earlier['pid']} on" in caplog.text
    assert set(before) == {".lock", ".lock-turn", "result"}


def test_a_finished_successor_leaves_nothing_to_the_frozen_one(tmp_path: Path) -> None:
    with frozen_holder(tmp_path, FIRST) as thaw:
        with hold_run(tmp_path, job=SECOND):
            pass
        hold_briefly(tmp_path)  # free for everybody, though the frozen one keeps its lock
        before = contents(tmp_path)
        assert thaw() == 9
        assert contents(tmp_path) == before


def test_without_a_successor_the_frozen_one_goes_on(tmp_path: Path) -> None:
    with frozen_holder(tmp_path, FIRST) as thaw:
        assert thaw() == 0
    assert (tmp_path / "result").read_text() == "0"


@pytest.mark.parametrize(
    "job",
    [None, Job("124", 7), Job("123", 2), Job("123", 1), Job("12", 9), Job("123_1", 9)],
    ids=str,
)
def test_others_than_a_later_start_are_refused(tmp_path: Path, job: Job | None) -> None:
    with frozen_holder(tmp_path, Job("123", 2)):
        before = contents(tmp_path)
        pid = json.loads(before[".lock"])["pid"]
        expected = (
            rf"is in use by process {pid} on {socket.gethostname()} \(Slurm job 123, restart 2\); "
            "use another --out"
        )
        with pytest.raises(StorageError, match=expected), hold_run(tmp_path, job=job):
            pass
        assert contents(tmp_path) == before


def test_a_job_does_not_take_over_from_nobodys_run(tmp_path: Path) -> None:
    refused = pytest.raises(StorageError, match="in use by process")
    with hold_run(tmp_path), refused, hold_run(tmp_path, job=SECOND):
        pass
    with hold_run(tmp_path, job=FIRST), pytest.raises(StorageError, match=r"\(Slurm job 123\)"):
        hold_briefly(tmp_path)


def test_each_start_takes_over_from_the_one_before(tmp_path: Path) -> None:
    with frozen_holder(tmp_path, FIRST) as first, frozen_holder(tmp_path, SECOND) as second:
        with hold_run(tmp_path, job=Job("123", 2)) as fence:
            assert first() == second() == 9
            fence()
        assert not (tmp_path / "result").exists()


def race_of_two(directory: Path) -> list[int]:
    """Let two later starts come at once; return their exit codes, the refused one's first."""
    start_read, start_write = os.pipe()
    done_read, done_write = os.pipe()

    def compete() -> None:
        os.close(start_write)
        os.close(done_write)
        os.read(start_read, 1)
        with hold_run(directory, job=SECOND) as fence:
            # Exclusive creation fails where another holds at the same time.
            (directory / "mine").touch(exist_ok=False)
            fence()
            os.read(done_read, 1)
            fence()
            (directory / "mine").unlink()

    children = [in_child(compete), in_child(compete)]
    os.close(start_write)  # the end of the pipe starts both
    codes = [exit_code_of_any(children)]
    os.close(done_write)
    codes.append(exit_code_of_any(children))
    os.close(start_read)
    os.close(done_read)
    return codes


def test_of_two_later_starts_one_holds_at_a_time(tmp_path: Path) -> None:
    for number in range(20):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        with frozen_holder(directory, FIRST) as thaw:
            assert race_of_two(directory) == [9, 0]
            assert thaw() == 9
        assert set(contents(directory)) == {".lock", ".lock-turn"}


def test_a_dead_holder_is_followed_by_one_of_two(tmp_path: Path) -> None:
    """The signature of the dead one is still there when the two come, and must deceive nobody."""
    for number in range(20):
        directory = tmp_path / f"{number}"
        with hold_run(directory, job=FIRST):
            pass
        assert race_of_two(directory) == [9, 0]


def test_what_a_killed_successor_left_is_no_hindrance(tmp_path: Path) -> None:
    with frozen_holder(tmp_path, FIRST) as thaw:
        (tmp_path / ".lock-next").write_text("a longer line than any signature " * 10)
        with hold_run(tmp_path, job=SECOND):
            json.loads((tmp_path / ".lock").read_text())
            assert thaw() == 9
    assert set(contents(tmp_path)) == {".lock", ".lock-turn"}


def test_a_successor_frozen_in_its_turn_refuses_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TURN_SECONDS", 0.05)
    descriptor = os.open(tmp_path / ".lock-turn", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match="which has not come to its start for"):
        hold_briefly(tmp_path)
    os.close(descriptor)
    hold_briefly(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"pid": 1, "host": "a", "job": "1\\u001b[31m", "restart": 0}',
        '{"pid": 1, "host": "a", "job": 123, "restart": 0}',
        '{"pid": 1, "host": "a", "job": "123", "restart": null}',
        "[1]",
        "",
    ],
)
def test_a_damaged_signature_names_no_job(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused = pytest.raises(StorageError, match="in use by")
    with refused as found, hold_run(tmp_path, job=Job("123", 9)):
        pass
    assert "Slurm" not in str(found.value)
    os.close(descriptor)
