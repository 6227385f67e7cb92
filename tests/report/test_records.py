"""Records: appended at once, rewound on resume, readable after a kill."""

import errno
import importlib.util
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import pytest

from bigsimclr.errors import MissingExtraError
from bigsimclr.report.records import FILE_NAME, Record, Records, read_records


def write_some(records: Records, steps: range) -> None:
    for step in steps:
        records.write(examples=step * 64, step=step, values={"train/loss": 1 / step})


def steps(run_dir: Path) -> list[int]:
    return [record.step for record in read_records(run_dir)]


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    records = Records(tmp_path, tensorboard=False)
    before = time.time()
    records.write(examples=640, step=10, values={"train/loss": 0.1, "knn/accuracy": 0.75})
    line = json.loads((tmp_path / FILE_NAME).read_text())
    assert line.keys() == {"examples", "step", "time", "values"}
    (record,) = read_records(tmp_path)
    values = {"train/loss": 0.1, "knn/accuracy": 0.75}
    assert record == Record(examples=640, step=10, time=record.time, values=values)
    assert before <= record.time <= time.time()
    records.close()
    records.close()


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []


def test_values_that_are_not_finite_keep_the_file_json(tmp_path: Path) -> None:
    records = Records(tmp_path, tensorboard=False)
    records.write(examples=1, step=1, values={"a": math.inf, "b": math.nan, "c": 1e-300})
    records.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=refuse)
    assert line["values"] == {"a": None, "b": None, "c": 1e-300}
    (record,) = read_records(tmp_path)
    assert math.isnan(record.values["a"])
    assert record.values["c"] == 1e-300


def test_rewind_drops_what_a_resumed_run_measures_again(tmp_path: Path) -> None:
    records = Records(tmp_path, tensorboard=False)
    write_some(records, range(1, 6))
    before = (tmp_path / FILE_NAME).read_bytes().splitlines()
    records.rewind(3 * 64)
    assert (tmp_path / FILE_NAME).read_bytes().splitlines() == before[:3]
    write_some(records, range(4, 7))
    records.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_rewind_to_the_beginning(tmp_path: Path) -> None:
    records = Records(tmp_path, tensorboard=False)
    records.rewind(0)
    write_some(records, range(1, 3))
    records.rewind(0)
    records.close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


@pytest.mark.parametrize("rewind", [False, True])
@pytest.mark.parametrize("torn", [b'{"exam', b"\xff\xfe", b'{"examples": 192, "step": 3}'])
def test_a_torn_last_line_is_passed_over(tmp_path: Path, torn: bytes, rewind: bool) -> None:
    records = Records(tmp_path, tensorboard=False)
    write_some(records, range(1, 3))
    records.close()
    with (tmp_path / FILE_NAME).open("ab") as stream:
        stream.write(torn)
    assert steps(tmp_path) == [1, 2]
    records = Records(tmp_path, tensorboard=False)
    if rewind:
        records.rewind(2 * 64)
    write_some(records, range(3, 4))
    records.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == 3


def test_a_full_disk_costs_records_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path, tensorboard=False)
    write_some(records, range(1, 2))
    original = os.write

    def half_then_full(descriptor: int, content: bytes) -> int:
        original(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "write", half_then_full)
        write_some(records, range(2, 4))
        patch.setattr(os, "write", lambda descriptor, content: original(descriptor, content[:5]))
        write_some(records, range(4, 5))
    assert caplog.text.count("No space left") == 1
    write_some(records, range(5, 6))
    records.close()
    assert steps(tmp_path) == [1, 5]


def test_without_tensorboard_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bigsimclr\[tensorboard\]'"):
        Records(tmp_path, tensorboard=True)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the extra `tensorboard` is missing"
)
def test_tensorboard_shows_the_resumed_values_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = Records(tmp_path, tensorboard=True)
    write_some(records, range(1, 6))
    records.rewind(3 * 64)
    records.write(examples=4 * 64, step=4, values={"train/loss": 7.0})
    records.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(64, 1.0), (128, 0.5), (192, pytest.approx(1 / 3)), (256, 7.0)]
