"""Checkpoints: values survive, damage is found, faults and kills leave only whole checkpoints."""

import errno
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bigsimclr.engine.checkpoint import (
    Tensors,
    clear_unfinished,
    newest_checkpoint,
    read_checkpoint,
)
from bigsimclr.engine.manifest import canonical_json, manifest_json, write_file
from bigsimclr.engine.saving import Saver
from bigsimclr.errors import CheckpointError, NumericsError, StorageError

FACTS = {"step": 3, "digest": "ab12", "scaler": None, "seconds": 1.5, "architecture": {"depth": 10}}


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"conv.weight": torch.randn(4, 3, 3, 3, generator=generator)},
        "optimizer": {"conv.weight/momentum": torch.randn(4, 3, generator=generator)},
    }


def save_checkpoint(
    root: Path, *, examples: int, tensors: Tensors, facts: Mapping[str, object], keep: int
) -> Path:
    """Write a checkpoint and wait for it."""
    saver = Saver(root, keep=keep)
    saver.begin(examples=examples, tensors=tensors, facts=facts)
    path = saver.finish()
    assert path is not None
    return path


def save(root: Path, examples: int, *, keep: int = 2, seed: int | None = None) -> Path:
    tensors = some_tensors(examples if seed is None else seed)
    return save_checkpoint(root, examples=examples, tensors=tensors, facts=FACTS, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def assert_equal(first: torch.Tensor, second: torch.Tensor) -> None:
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    assert torch.equal(first, second)


# --- values ----------------------------------------------------------------------------------


def test_every_kind_of_tensor_survives(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "model": {
            "float64": torch.tensor([1.0, 5e-324, -0.0], dtype=torch.float64),
            "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "float16": torch.tensor([0.5], dtype=torch.float16),
            "parameter": torch.nn.Parameter(torch.ones(2, 2)),
            "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "transposed": base.view(4, 6).T,
            "expanded": torch.ones(1).expand(7),
            "strided": base[1::3],
        },
        "optimizer": {"shared": base, "shared_too": base, "shared_part": base[3:9]},
        "state": {
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 5),
            "flags": torch.tensor([True, False]),
            "bytes": torch.arange(256, dtype=torch.uint8),
            "counts": torch.tensor([2**62, -1]),
        },
        "nothing": {},
    }
    path = save_checkpoint(tmp_path, examples=128, tensors=tensors, facts=FACTS, keep=2)
    read = read_checkpoint(path)
    assert (read.path, read.examples, read.facts) == (tmp_path / "000000000128", 128, FACTS)
    assert read.tensors.keys() == tensors.keys()
    for section, named in tensors.items():
        assert read.tensors[section].keys() == named.keys()
        for name, tensor in named.items():
            assert_equal(read.tensors[section][name], tensor.detach())
            assert read.tensors[section][name].is_contiguous()


def test_loaded_tensors_can_be_written_to(tmp_path: Path) -> None:
    read = read_checkpoint(save(tmp_path, 1))
    read.tensors["model"]["conv.weight"].zero_()
    assert_equal(
        read_checkpoint(read.path).tensors["model"]["conv.weight"],
        some_tensors(1)["model"]["conv.weight"],
    )


def test_the_checkpoint_is_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 64)
    assert names(path) == [
        "facts.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert_equal(stored["conv.weight"], some_tensors(64)["model"]["conv.weight"])
    assert json.loads((path / "facts.json").read_text()) == FACTS
    assert json.loads((path / "manifest.json").read_text())["examples"] == 64


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_saving_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    save(tmp_path, 1)
    newest_checkpoint(tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("section", ["model", "optimizer"])
def test_values_that_are_not_finite_are_never_published(
    tmp_path: Path, value: float, section: str
) -> None:
    tensors = some_tensors()
    next(iter(tensors[section].values()))[1, 0] = value
    with pytest.raises(NumericsError, match=rf"{section} tensor conv\.weight"):
        save_checkpoint(tmp_path, examples=1, tensors=tensors, facts=FACTS, keep=2)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("examples", "keep", "section"),
    [(1, 1, "model"), (-1, 2, "model"), (10**12, 2, "model"), (1, 2, "../x"), (1, 2, "M")],
)
def test_arguments_are_checked(tmp_path: Path, examples: int, keep: int, section: str) -> None:
    tensors = {section: {"a": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"keep|digits|section"):
        save_checkpoint(tmp_path, examples=examples, tensors=tensors, facts=FACTS, keep=keep)
    assert names(tmp_path) == []


# --- which one is read, which ones stay ------------------------------------------------------


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    (tmp_path / ".tmp-000000000008-aa").mkdir()
    (tmp_path / "notes").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_the_newest_is_chosen_by_examples_not_by_file_time(tmp_path: Path) -> None:
    for age, examples in enumerate([9, 10, 100]):
        os.utime(save(tmp_path, examples, keep=5), (1e9 - age, 1e9 - age))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.examples == 100


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for examples in range(1, 7):
        save(tmp_path, examples, keep=3)
    assert names(tmp_path) == ["000000000004", "000000000005", "000000000006"]


def test_a_damaged_checkpoint_does_not_push_out_an_intact_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "model.safetensors", 4000)
    save(tmp_path, 3)
    assert names(tmp_path) == ["000000000001", "000000000002", "000000000003"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["000000000003", "000000000004"]


def test_an_intact_checkpoint_of_the_same_examples_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path, 1, seed=1)
    inode = path.stat().st_ino
    assert save(tmp_path, 1, seed=2) == path
    assert path.stat().st_ino == inode
    assert names(tmp_path) == [path.name]


def test_a_damaged_checkpoint_of_the_same_examples_is_set_aside(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").unlink()
    save(tmp_path, 1)
    assert read_checkpoint(path).examples == 1
    aside, published = names(tmp_path)
    assert aside.startswith(".bad-000000000001-")
    assert published == path.name


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / ".tmp-000000000002-aa")
    (tmp_path / ".del-000000000000-bb").mkdir()
    (tmp_path / ".bad-000000000000-cc").mkdir()
    victim = tmp_path.parent / "victim"
    victim.mkdir()
    (tmp_path / ".tmp-link").symlink_to(victim)
    clear_unfinished(tmp_path)
    assert names(tmp_path) == [".bad-000000000000-cc", "000000000001"]
    assert victim.is_dir()
    clear_unfinished(tmp_path / "absent")


def refuse() -> None:
    raise StorageError("taken over")


def test_who_lost_the_run_clears_nothing_away(tmp_path: Path) -> None:
    unfinished = tmp_path / ".tmp-000000000128-abcdef01"  # the new holder's save in progress
    unfinished.mkdir()
    saver = Saver(tmp_path, keep=2, fence=refuse)
    with pytest.raises(StorageError, match="taken over"):
        saver.begin(examples=128, tensors=some_tensors(), facts=FACTS)
    assert names(tmp_path) == [unfinished.name]


def test_who_loses_the_run_while_saving_publishes_nothing(tmp_path: Path) -> None:
    first = save(tmp_path, 64)
    lost = False

    def fence() -> None:
        if lost:
            refuse()

    saver = Saver(tmp_path, keep=2, fence=fence)
    saver.begin(examples=128, tensors=some_tensors(), facts=FACTS)
    lost = True
    with pytest.raises(StorageError, match="taken over"):
        saver.finish()
    assert names(tmp_path) == [first.name]


def test_permissions_follow_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert save(tmp_path, 1).stat().st_mode & 0o777 == 0o750


# --- damage ----------------------------------------------------------------------------------


def assert_found_and_skipped(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint of 2 examples is damaged, the one of 1 is not."""
    caplog.clear()
    with pytest.raises(CheckpointError, match="000000000002 is damaged"):
        read_checkpoint(root / "000000000002")
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(root)
    assert newest is not None
    assert newest.examples == 1
    assert "000000000002 is damaged" in caplog.text


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    chooser = random.Random(0)
    for name in names(path):
        size = (path / name).stat().st_size * 8
        bits = range(size) if name == "manifest.json" else chooser.sample(range(size), 100)
        for bit in itertools.islice(bits, 0, None, 7 if name == "manifest.json" else 1):
            flip(path / name, bit)
            with pytest.raises(CheckpointError, match="is damaged"):
                read_checkpoint(path)
            flip(path / name, bit)
    assert read_checkpoint(path).examples == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["facts.json", "manifest.json", "model.safetensors", "optimizer.safetensors"]
)
def test_truncated_files_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, share: float
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    os.truncate(file, int(file.stat().st_size * share))
    assert_found_and_skipped(tmp_path, caplog)


def test_wrong_files_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    spare = tmp_path / "spare"
    shutil.copytree(second, spare)
    model = second / "model.safetensors"

    def restore() -> None:
        shutil.rmtree(second)
        shutil.copytree(spare, second)

    model.unlink()
    assert_found_and_skipped(tmp_path, caplog)
    shutil.copy(first / "model.safetensors", model)
    assert_found_and_skipped(tmp_path, caplog)
    restore()
    shutil.copy(model, second / "queue.safetensors")
    assert_found_and_skipped(tmp_path, caplog)
    restore()
    shutil.copy(first / "manifest.json", second / "manifest.json")
    assert_found_and_skipped(tmp_path, caplog)
    restore()
    model.unlink()
    model.symlink_to(spare / "model.safetensors")
    assert_found_and_skipped(tmp_path, caplog)
    model.unlink()
    os.mkfifo(model)
    assert_found_and_skipped(tmp_path, caplog)
    shutil.rmtree(second)
    second.symlink_to(spare)
    assert_found_and_skipped(tmp_path, caplog)
    second.unlink()
    second.write_text("a file")
    assert_found_and_skipped(tmp_path, caplog)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    moved = save(tmp_path, 1).rename(tmp_path / "000000000009")
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        read_checkpoint(moved)


def test_when_none_is_intact_a_person_decides(tmp_path: Path) -> None:
    for examples in (1, 2):
        (save(tmp_path, examples) / "facts.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        newest_checkpoint(tmp_path)
    assert "000000000001" in str(caught.value)
    assert "000000000002" in str(caught.value)


def forge(path: Path, manifest: dict[str, object]) -> None:
    """Write a manifest whose own digest is right."""
    digest = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(canonical_json({**manifest, "sha256": digest}))


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/passwd", "a/b.safetensors", "x.pkl"])
def test_a_manifest_never_reaches_outside(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    entry = {"name": name, "size": 1, "sha256": "0" * 64}
    forge(path, {"schema": 1, "examples": 1, "files": [entry]})
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read_checkpoint(path)


def test_a_later_schema_is_refused_not_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1)
    forge(save(tmp_path, 2), {"schema": 2, "examples": 2, "files": []})
    with pytest.raises(CheckpointError, match=r"later version \(schema 2.*Upgrade"):
        newest_checkpoint(tmp_path)


def test_verified_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "000000000001"
    path.mkdir()
    files = [
        write_file(path / "facts.json", b"{}"),
        write_file(path / "model.safetensors", b"\xff" * 64),
    ]
    write_file(path / "manifest.json", manifest_json(1, files))
    with pytest.raises(CheckpointError, match="unreadable content"):
        read_checkpoint(path)


def test_a_checkpoint_that_will_not_fit_is_refused_before_it_is_there(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "checkpoints", keep=2)
    saver.require_space({"model": {"weight": torch.zeros(3)}})
    petabytes = torch.empty(2**50, dtype=torch.float32, device="meta")
    with pytest.raises(StorageError, match=r"it needs 4,503,599,627\.4 MB, [\d,.]+ MB are free"):
        saver.require_space({"model": {"weight": torch.zeros(3)}, "queue": {"rows": petabytes}})
    assert not (tmp_path / "checkpoints").exists()


# --- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "rename"])
def test_a_failing_call_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    save(tmp_path, 1)
    original = getattr(os, call)
    for failing in itertools.count():
        calls = itertools.count()

        def faulty(*args, _failing=failing, _calls=calls, **options):  # type: ignore[no-untyped-def]
            if next(_calls) == _failing:
                raise OSError(code, os.strerror(code))
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                path, message = save(tmp_path, 2), ""
            except StorageError as error:
                path, message = None, str(error)
        if path is None:
            assert os.strerror(code) in message
            assert "000000000002" in message
        # A failure after the rename may leave the new one, whole.
        assert not [name for name in names(tmp_path) if name.startswith(".tmp")]
        assert read_checkpoint(tmp_path / "000000000001").examples == 1
        if "000000000002" in names(tmp_path):
            shutil.rmtree(read_checkpoint(tmp_path / "000000000002").path)
        if path is not None and next(calls) <= failing:
            break
    assert failing >= 1


def test_a_disk_without_space_is_found_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:4], 1, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    tensors = {"model": {"big": torch.zeros(250_000)}}
    with pytest.raises(StorageError, match=r"needs 1\.0 MB, 0\.0 MB are free") as caught:
        save_checkpoint(tmp_path, examples=1, tensors=tensors, facts={}, keep=2)
    assert str(tmp_path / "000000000001") in str(caught.value)
    assert names(tmp_path) == []


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    program = f"""
import resource, torch
from pathlib import Path
from bigsimclr.engine.saving import Saver
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {{"model": {{"big": torch.zeros(250_000)}}}}
saver = Saver(Path({str(tmp_path)!r}), keep=2)
saver.begin(examples=1, tensors=tensors, facts={{}})
saver.finish()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "StorageError: cannot write checkpoint" in done.stderr
    assert "File too large; it needs 1.0 MB" in done.stderr
    assert names(tmp_path) == []


# --- kills -----------------------------------------------------------------------------------


def save_forever(root: Path) -> None:
    """Save checkpoints whose tensors follow from their number, from the newest one on."""
    try:
        newest = newest_checkpoint(root)
        for examples in itertools.count(1 if newest is None else newest.examples + 1):
            save(root, examples)
    finally:
        os._exit(1)  # a forked child must never return into the test session


def published(root: Path) -> list[str]:
    return [name for name in names(root) if not name.startswith(".")]


def unfinished(root: Path) -> set[str]:
    return set(names(root)) - set(published(root))


def wait_until(condition: Callable[[], object], child: int) -> None:
    while not condition():
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert ended is None, "the saving process failed by itself"
        time.sleep(0.0002)


def test_fifty_kills_leave_only_whole_checkpoints(tmp_path: Path) -> None:
    chooser = random.Random(1)
    inside, before = 0, published(tmp_path)
    for kill in range(50):
        left_over = unfinished(tmp_path)
        child = os.fork()
        if child == 0:
            save_forever(tmp_path)
        if kill % 2:  # any time after a checkpoint was published
            wait_until(lambda old=before: published(tmp_path)[-1:] != old[-1:], child)
            time.sleep(chooser.uniform(0.0, 0.02))
        else:  # while one is being saved
            wait_until(lambda old=left_over: unfinished(tmp_path) - old, child)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        inside += bool(unfinished(tmp_path) - left_over)
        after = published(tmp_path)
        for name in after:
            read = read_checkpoint(tmp_path / name)
            for section, named in some_tensors(read.examples).items():
                for key, tensor in named.items():
                    assert_equal(read.tensors[section][key], tensor)
        assert len(after) >= min(2, len(before))
        assert after[-1:] >= before[-1:]
        before = after
    assert inside >= 1
    assert int(before[-1]) >= 25
