"""Interrupted and continued equals uninterrupted, bit for bit."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigsimclr.data.folder import training_folder
from bigsimclr.data.pack import pack
from bigsimclr.engine.checkpoint import newest_checkpoint
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import CheckpointError, DataError, RecipeError, Stopped
from bigsimclr.recipe.schema import AnyStage
from bigsimclr.report.progress import Progress
from bigsimclr.stages.single import run_stage
from bigsimclr.world import ALONE
from tests.stages import tiny

pytestmark = pytest.mark.slow

QUEUE = ("loss.queue.length=48", "loss.queue.ema_decay=0.9")


def _run(recipe: AnyStage, directory: Path, progress: Progress) -> None:
    with StopRequest() as stop:
        run_stage(recipe, directory, world=ALONE, progress=progress, stop=stop)


class StopAfter(Progress):
    """Sends this process a signal when a step has been recorded."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__(None, enabled=False)
        self._stop_at, self._number = step, number

    def update(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._stop_at and "train/loss" in values:
            os.kill(os.getpid(), self._number)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(directory / "checkpoints")
    assert checkpoint is not None
    return {f"{s}/{n}": t for s, inner in checkpoint.tensors.items() for n, t in inner.items()}


def losses(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["values"]["train/loss"])
        for line in lines
        if "train/loss" in line["values"]
    ]


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGINT, QUEUE),
        (signal.SIGUSR2, ("parallel.precision=fp16",)),
        (signal.SIGTERM, ("batch.micro_batch=8",)),
        (signal.SIGTERM, ("optimizer={kind: adamw, learning_rate: 0.01}",)),
    ],
)
def test_stopped_and_continued_equals_uninterrupted(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
    overrides: tuple[str, ...],
) -> None:
    keys = ("log.every_steps=1", *overrides)
    tiny.run(tiny.PRETRAIN, tmp_path / "whole", *keys)
    with pytest.raises(Stopped, match=number.name) as stopped:
        _run(tiny.recipe_of(tiny.PRETRAIN, *keys), tmp_path / "parts", StopAfter(3, number))
    assert stopped.value.exit_code == 75
    assert (tmp_path / "parts" / "checkpoints" / f"{3 * 32:012}").is_dir()
    tiny.run(tiny.PRETRAIN, tmp_path / "parts", *keys)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    is_slow = "parallel.precision=fp16" in overrides  # these runs are on a CPU
    assert ("most CPUs convolve in fp16" in caplog.text) == is_slow


def test_damaged_checkpoints_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.run(tiny.PRETRAIN, tmp_path / "whole", "log.every_steps=1")
    with pytest.raises(Stopped):
        _run(
            tiny.recipe_of(tiny.PRETRAIN, "log.every_steps=1"),
            tmp_path / "parts",
            StopAfter(4, signal.SIGTERM),
        )
    newest = tmp_path / "parts" / "checkpoints" / f"{4 * 32:012}"
    model = newest / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    model.write_bytes(content)
    tiny.run(tiny.PRETRAIN, tmp_path / "parts", "log.every_steps=1")
    assert newest.name in caplog.text
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_no_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        _run(
            tiny.recipe_of(tiny.PRETRAIN, "log.every_steps=1"),
            tmp_path / "a",
            StopAfter(2, signal.SIGTERM),
        )
    for file in (tmp_path / "a" / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="none"):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", "log.every_steps=1")


def test_changed_images_are_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    keys = (
        "data={kind: arrays, root: " + str(tmp_path / "x.npz") + "}",
        "log.every_steps=1",
    )
    with pytest.raises(Stopped):
        _run(tiny.recipe_of(tiny.PRETRAIN, *keys), tmp_path / "a", StopAfter(2, signal.SIGTERM))
    images[3, 2, 1, 0] ^= 255
    np.savez(tmp_path / "x.npz", images=images)
    with pytest.raises(DataError, match="changed since the run began: training images"):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", *keys)


def test_what_changed_in_a_folder_is_told(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / f"set/{number % 2}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    keys = ("data={kind: folder, root: " + str(tmp_path / "set") + "}", "log.every_steps=1")
    with pytest.raises(Stopped):
        _run(tiny.recipe_of(tiny.PRETRAIN, *keys), tmp_path / "a", StopAfter(2, signal.SIGTERM))
    for name in ("0/50.png", "0/60.png"):
        (tmp_path / "set" / name).write_bytes((tmp_path / "set/0/00.png").read_bytes())
    (tmp_path / "set/0/02.png").rename(tmp_path / "set/1/02.png")
    with pytest.raises(
        DataError,
        match=r"changed since the run began: training images \(training images: "
        r"\+3 new \(0/50\.png, 0/60\.png, 1/02\.png\), -1 gone \(0/02\.png\) of 40 images\);",
    ):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", *keys)
    (tmp_path / "a/images.json.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"changed since the run began: training images; restore"):
        tiny.run(tiny.PRETRAIN, tmp_path / "a", *keys)


@pytest.mark.parametrize("kind", ["uniform", "runs", "mix"])
def test_a_run_on_shards_continues_unless_their_order_changed(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / f"set/{number % 2}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    images = training_folder(tmp_path / "set", ".", labelled=True)
    for place, size in (("one", 40_000), ("two", 40_000), ("other", 20_000)):
        pack(images, tmp_path / place, shard_bytes=size)

    def keys(place: str, window: int = 2) -> tuple[str, ...]:
        order = "" if kind == "uniform" else f", order: runs, window: {window}"
        shards = f"{{kind: shards, root: {tmp_path / place}{order}}}"
        digits = "{weight: 1, data: {kind: digits}}"
        mix = f"{{kind: mix, sources: [{{weight: 2, data: {shards}}}, {digits}]}}"
        return f"data={mix if kind == 'mix' else shards}", "log.every_steps=1"

    tiny.run(tiny.PRETRAIN, tmp_path / "whole", *keys("one"))
    recipe = tiny.recipe_of(tiny.PRETRAIN, *keys("one"))
    with pytest.raises(Stopped):
        _run(recipe, tmp_path / "parts", StopAfter(3, signal.SIGTERM))
    if kind != "uniform":
        with pytest.raises(RecipeError, match=r"data\.\S*window \(2 -> 3\)"):
            tiny.run(tiny.PRETRAIN, tmp_path / "parts", *keys("one", 3))
        with pytest.raises(DataError, match="changed since the run began: training images;"):
            tiny.run(tiny.PRETRAIN, tmp_path / "parts", *keys("other"))
    last = "other" if kind == "uniform" else "two"
    tiny.run(tiny.PRETRAIN, tmp_path / "parts", *keys(last), "input.workers=2")
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    import random

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    tiny.run(tiny.PRETRAIN, tmp_path / "a", "schedule.steps=2", "input.workers=2")
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
