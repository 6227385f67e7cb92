"""Files are there whole or not at all."""

from pathlib import Path

import pytest

from bigsimclr.errors import StorageError
from bigsimclr.storage import publish, whole_file


def test_a_new_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    with whole_file(file, overwrite=False) as beside:
        beside.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    assert [path.name for path in file.parent.iterdir()] == ["b.txt"]


def test_nothing_stays_when_the_work_fails(tmp_path: Path) -> None:
    publish(tmp_path / "x", "before")

    def fail() -> None:
        with whole_file(tmp_path / "x", overwrite=True) as beside:
            beside.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert (tmp_path / "x").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    publish(tmp_path / "x", "one")
    with pytest.raises(StorageError, match=r"x exists already; choose another name$"):
        publish(tmp_path / "x", "two", overwrite=False)
    assert (tmp_path / "x").read_text() == "one"
    publish(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "two"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="exists already"):
        publish(tmp_path / "link", "three", overwrite=False)


def test_what_came_while_the_work_went_on_stays(tmp_path: Path) -> None:
    def work() -> None:
        with whole_file(tmp_path / "x", overwrite=False) as beside:
            beside.write_text("late")
            publish(tmp_path / "x", "early")

    with pytest.raises(StorageError, match=r"x exists already; choose another name$"):
        work()
    assert (tmp_path / "x").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_places_that_cannot_hold_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file is a file, not a folder$"):
        publish(tmp_path / "file" / "x", "")
    with pytest.raises(StorageError, match=r"is a directory; name a file$"):
        publish(tmp_path, "")
    with pytest.raises(StorageError, match=r"^/proc/x cannot be written: "):
        publish(Path("/proc/x"), "")
