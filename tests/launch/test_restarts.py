"""When a job gives up, and what its lines say of it."""

import json
import stat
from pathlib import Path

import pytest

from bigsimclr.errors import DistributedError
from bigsimclr.launch.restarts import RestartLog, last_end, progress_of

NONE = "0 finished, 0 examples"


def allocation(log: RestartLog, restart: int, then: str | None, progress: str = NONE) -> None:
    log.begin(restart, progress, limit=3)
    if then is not None:
        log.end(restart, 6, then)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_so_many_restarts_without_progress_and_no_more(tmp_path: Path, limit: int) -> None:
    log = RestartLog(tmp_path, "12")
    for restart in range(limit + 1):
        log.begin(restart, NONE, limit=limit)
        assert log.may_restart(NONE, limit=limit) == (restart < limit)
        log.end(restart, 6, "requeued")
    with pytest.raises(DistributedError) as caught:
        log.begin(limit + 1, NONE, limit=limit)
    assert str(caught.value) == (
        f"job 12 was restarted {limit} times without progress ({NONE}) and is not started again; "
        "its log says what ends it, and bigsimclr submit continues it"
    )
    assert log.restarts() == limit


def test_progress_begins_the_count_again(tmp_path: Path) -> None:
    log = RestartLog(tmp_path, "12")
    for restart in range(20):
        allocation(log, restart, "requeued", f"0 finished, {restart // 3} examples")
    assert log.restarts() == 19
    assert log.may_restart("0 finished, 7 examples", limit=0)
    allocation(log, 20, None, "0 finished, 6 examples")
    allocation(log, 21, None, "0 finished, 6 examples")
    assert not log.may_restart("0 finished, 6 examples", limit=3)  # 18 to 21 began there
    assert log.may_restart("0 finished, 6 examples", limit=4)


def test_preemptions_are_excused(tmp_path: Path) -> None:
    log = RestartLog(tmp_path, "12")
    for restart in range(10):
        allocation(log, restart, "preempted")
    for restart in range(10, 13):
        allocation(log, restart, "requeued")
        allocation(log, restart, "preempted")
    assert log.may_restart(NONE, limit=3)
    allocation(log, 13, "requeued")
    assert not log.may_restart(NONE, limit=3)


def test_an_allocation_that_left_no_end_counts(tmp_path: Path) -> None:
    log = RestartLog(tmp_path, "12")
    for restart in range(4):
        allocation(log, restart, None)
    assert not log.may_restart(NONE, limit=3)
    assert last_end(tmp_path, "12") is None


def test_torn_lines_cost_themselves_alone(tmp_path: Path) -> None:
    log = RestartLog(tmp_path, "12")
    path = tmp_path / "12.jsonl"
    for restart in range(4):
        allocation(log, restart, None)
        with path.open("ab") as file:
            file.write(b'{"event": "ended", "restart": 0, "co\xff')  # a node lost while it wrote
    assert [line["restart"] for line in log.lines()] == [0, 1, 2, 3]
    assert not log.may_restart(NONE, limit=3)
    path.write_bytes(path.read_bytes() + b"\n[1]\nnull\n12\n")
    assert log.restarts() == 3


def test_a_log_holds_what_happened(tmp_path: Path) -> None:
    log = RestartLog(tmp_path / "slurm", "12_3")
    assert list(log.lines()) == []
    assert log.restarts() == 0
    assert last_end(tmp_path / "slurm", "12_3") is None
    log.begin(0, NONE, limit=3)
    assert last_end(tmp_path / "slurm", "12_3") is None
    log.end(0, 75, "requeued")
    assert last_end(tmp_path / "slurm", "12_3") == "requeued"
    log.end(1, 3, "failed")
    assert last_end(tmp_path / "slurm", "12_3") == "failed (exit 3)"
    path = tmp_path / "slurm" / "12_3.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert line.pop("time") > 1.7e9
    assert lines == [
        {"event": "began", "restart": 0, "progress": NONE},
        {"event": "ended", "restart": 0, "code": 75, "then": "requeued"},
        {"event": "ended", "restart": 1, "code": 3, "then": "failed"},
    ]


def test_elements_of_an_array_count_each_for_itself(tmp_path: Path) -> None:
    for element in range(3):
        allocation(RestartLog(tmp_path, f"12_{element}"), 0, "requeued")
    assert all(RestartLog(tmp_path, f"12_{element}").restarts() == 0 for element in range(3))
    assert RestartLog(tmp_path, "12_1").may_restart(NONE, limit=1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "12.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        RestartLog(tmp_path, "12").begin(0, NONE, limit=3)
    assert not (tmp_path / "elsewhere").exists()


def test_progress(tmp_path: Path) -> None:
    assert progress_of(tmp_path) == NONE
    assert progress_of(tmp_path / "none") == NONE
    for run, examples in (("pretrain", (256, 1024, 512)), ("finetune/seed=1", (64,))):
        for number in examples:
            (tmp_path / run / "checkpoints" / f"{number:012d}").mkdir(parents=True)
    (tmp_path / "pretrain" / "checkpoints" / ".new-4096").mkdir()
    (tmp_path / "pretrain" / "checkpoints" / "latest").mkdir()
    assert progress_of(tmp_path) == "0 finished, 1088 examples"
    assert progress_of(tmp_path / "finetune") == "0 finished, 64 examples"
    (tmp_path / "pretrain" / "result.json").write_text("{}")
    assert progress_of(tmp_path) == "1 finished, 1088 examples"
