"""One task of a job as a process of its own, with the variables that Slurm sets."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigsimclr.report.attempts import read_attempts
from tests.architecture.tree import ROOT
from tests.stages import tiny

SHOW = """\
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
print(json.dumps([sys.argv[1:], *(os.environ.get(name) for name in names)]))
"""


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment, with modules of a folder before all others."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "TORCHELASTIC", "MASTER", "CUDA"))
    }
    return {**kept, "PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1", **variables}


def module(folder: Path, name: str, text: str) -> None:
    file = folder / "modules" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def command(notes: Path, *words: str) -> list[str]:
    notes.mkdir(exist_ok=True)
    return [sys.executable, "-m", "bigsimclr.launch.task", "--notes", str(notes), *words]


def note(notes: Path, rank: int) -> object:
    return json.loads((notes / f"rank-{rank}.json").read_text())


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A package that takes the toolkit's place behind the task, and shows how it was started."""
    for name in ("__init__.py", "errors.py"):
        module(tmp_path, f"bigsimclr/{name}", "")
    module(tmp_path, "bigsimclr/launch/__init__.py", "")
    source = ROOT / "bigsimclr" / "launch" / "task.py"
    module(tmp_path, "bigsimclr/launch/task.py", source.read_text())
    module(tmp_path, "bigsimclr/__main__.py", SHOW)
    return tmp_path


def start(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder / "notes", *words),
        env=environment(folder / "modules", **variables),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["3", "8", "1", "2"]),
        ({"SLURM_NTASKS_PER_NODE": "2(x4)"}, ["3", "8", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["3", "8", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["3", "8", "0", "2"]),  # a GPU of its own
        ({"CUDA_VISIBLE_DEVICES": ""}, ["3", "8", "1", "2"]),
        # Of the shell that submitted: not ours.
        ({"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "5"}, ["3", "8", "1", "2"]),
        # Of torchrun, which started this process: its word counts.
        (
            {
                "TORCHELASTIC_RUN_ID": "x",
                "RANK": "7",
                "WORLD_SIZE": "9",
                "LOCAL_RANK": "5",
                "LOCAL_WORLD_SIZE": "6",
            },
            ["7", "9", "5", "6"],
        ),
    ],
)
def test_a_rank_learns_who_it_is(
    shown: Path, variables: dict[str, str], expected: list[str]
) -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    slurm["SLURM_NTASKS_PER_NODE"] = "2"
    words = ["run", "a b", "k=$(x)", "--out", "'"]
    ended = start(shown, *words, **{**slurm, **variables})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == [words, *expected]


SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("ending", "code", "noted"),
    [
        ("", 0, 0),
        ("sys.exit(0)", 0, 0),
        ("sys.exit(3)", 3, 3),
        ("sys.exit(75)", 75, 75),
        ("sys.exit('in words')", 1, 1),
        ("1 / 0", 1, 1),
    ],
)
def test_a_rank_leaves_its_code(shown: Path, ending: str, code: int, noted: int) -> None:
    module(shown, "bigsimclr/__main__.py", f"import sys\n{ending}\n")
    ended = start(shown, "run", **SLURM)
    assert ended.returncode == code
    assert note(shown / "notes", 0) == {"code": noted, "signals": []}


def test_notes_that_cannot_be_written_change_nothing(shown: Path) -> None:
    module(shown, "bigsimclr/__main__.py", "import sys; sys.exit(75)\n")
    (shown / "notes").mkdir()
    (shown / "notes" / "rank-0.json").mkdir()
    ended = start(shown, "run", **SLURM)
    assert (ended.returncode, ended.stderr) == (75, "")


def test_every_signal_is_noted_whoever_handles_it(shown: Path) -> None:
    text = (
        "import os, signal, sys\n"
        "for number in (signal.SIGTERM, signal.SIGUSR2):\n"
        "    signal.signal(number, lambda *_: None)\n"
        "for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):\n"
        "    os.kill(os.getpid(), number)\n"
        "sys.exit(75)\n"
    )
    module(shown, "bigsimclr/__main__.py", text)
    ended = start(shown, "run", **SLURM)
    assert ended.returncode == 75
    noted = note(shown / "notes", 0)
    assert noted == {"code": 75, "signals": ["SIGUSR2", "SIGTERM", "SIGUSR2"]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_while_torch_is_loaded(tmp_path: Path, number: signal.Signals) -> None:
    """Loading PyTorch takes seconds; here it never ends."""
    begun = tmp_path / "begun"
    text = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)\n"
    module(tmp_path, "torch/__init__.py", text)
    notes = tmp_path / "notes"
    words = ["run", "digits/1_pretrain", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command(notes, *words),
        env=environment(tmp_path / "modules", **SLURM),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not begun.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert begun.exists(), process.poll()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75
    assert said == f"bigsimclr: stopped: by {number.name}, before training\n"
    assert note(notes, 0) == {"code": 75, "signals": [number.name]}
    assert not (tmp_path / "run").exists()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.mark.slow
def test_torchrun_in_one_task_starts_the_ranks_of_a_node(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(tiny.PRETRAIN)
    ended = start(
        tmp_path,
        *("--torchrun", "2", "run", str(recipe), "schedule.steps=2", "--out", str(run)),
        SLURM_NNODES="1",
        SLURM_NODEID="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        RANK="7",
        OMP_NUM_THREADS="1",
    )
    assert ended.returncode == 0, ended.stderr
    assert [attempt.world_size for attempt in read_attempts(run)] == [2]
    assert (run / "result.json").exists()
    for rank in range(2):
        assert note(tmp_path / "notes", rank) == {"code": 0, "signals": []}


@pytest.mark.slow
def test_ranks_of_torchrun_save_when_all_processes_get_the_signal(tmp_path: Path) -> None:
    """Slurm signals every process of a task; torchrun itself must not end the ranks."""
    recipe, run, notes = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "notes"
    recipe.write_text(tiny.PRETRAIN)
    words = ["--torchrun", "2", "run", str(recipe), "schedule.steps=100000", "--out", str(run)]
    variables = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        command(notes, *words, "log.every_steps=1"),
        env=environment(
            tmp_path / "modules", **variables, MASTER_PORT=free_port(), OMP_NUM_THREADS="1"
        ),
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.1)
        for child in [process.pid, *_children(process.pid)]:
            os.kill(child, signal.SIGUSR2)
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 1  # torchrun's, whatever it was
    for rank in range(2):
        found = note(notes, rank)
        assert isinstance(found, dict)
        assert found["code"] == 75
        assert found["signals"][0] == "SIGUSR2"


def _children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in text.split()]
