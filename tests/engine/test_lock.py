"""The run directory lock: one holder, freed by any death, and a directory proven writable."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigsimclr.engine.lock import hold_run
from bigsimclr.errors import StorageError


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
            worker = os.fork()
            if worker:
                os.write(writer, worker.to_bytes(8, "big"))
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
