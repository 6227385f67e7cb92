import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.data import Sample, Source
from bigsimclr.data.arrays import ArraySource
from bigsimclr.data.decode import UnreadableImageError
from bigsimclr.data.folder import training_folder
from bigsimclr.data.loader import Batch, Loader, evaluation_batches, view_hash
from bigsimclr.data.order import Order
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError
from tests.data.conftest import Encode

DISTORT = ViewSettings(
    image_size=8,
    colour_strength=1.0,
    colour_probability=0.8,
    grey_probability=0.2,
    blur_probability=0.5,
)
CPU = torch.device("cpu")


class Single:
    """The images of an array source, read one by one; some are broken, one may kill its reader."""

    def __init__(
        self, images: NDArray[np.uint8], broken: tuple[int, ...] = (), deadly: int = -1
    ) -> None:
        self.whole = ArraySource(images, np.arange(len(images)))
        self.classes = tuple(str(number) for number in range(len(images)))
        self.labels = self.whole.labels
        self.fingerprint = self.whole.fingerprint
        self.image_size: tuple[int, int] | None = None
        self.broken, self.deadly = broken, deadly

    def __len__(self) -> int:
        return len(self.whole)

    def name(self, index: int) -> str:
        return self.whole.name(index)

    def read(self, index: int) -> Sample:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.broken:
            raise UnreadableImageError("broken on purpose")
        return self.whole.read(index)


def loader(source: Source, *, seed: int = 5, global_batch: int = 7, **options: object) -> Loader:
    options.setdefault("indices", np.arange(len(source)))
    options.setdefault("labels", source.labels)
    options.setdefault("settings", DISTORT)
    options.setdefault("means", Means(workers=options.pop("workers", 0)))
    return Loader(source, views=2, seed=seed, global_batch=global_batch, **options)


def walked(source: Source, first: int = 0, steps: int = 6, **options: object) -> Batch:
    return Batch.join(list(loader(source, **options).batches(first, steps)))


def test_one_view_hash_over_workers_resumption_and_ranks(class_folder: Path) -> None:
    source = training_folder(class_folder, ".", labelled=True)
    straight = walked(source, steps=9)
    expected = view_hash(straight)
    for workers in (1, 3):
        found = walked(source, steps=9, workers=workers)
        assert view_hash(found) == expected
        assert torch.equal(found.pixels, straight.pixels)
    for resumed, workers in ((1, 0), (4, 1), (8, 3)):
        before = walked(source, steps=resumed)
        after = walked(source, first=7 * resumed, steps=9 - resumed, workers=workers)
        assert view_hash(Batch.join([before, after])) == expected
    for world_size in (2, 3):
        ranks = [
            loader(source, rank=rank, world_size=world_size).batches(0, 9)
            for rank in range(world_size)
        ]
        pieces = [piece for step in zip(*ranks, strict=True) for piece in step]
        assert view_hash(Batch.join(pieces)) == expected


def test_arrays_in_memory_have_the_same_stream(pictures: NDArray[np.uint8]) -> None:
    whole, single = ArraySource(pictures, np.arange(12)), Single(pictures)
    fast, slow = walked(whole), walked(single)
    assert fast.pixels.dtype == torch.uint8
    assert fast.pixels.shape == (42, 3, 9, 11)
    assert slow.pixels.shape == (2, 42, 3, 8, 8)
    assert view_hash(fast) == view_hash(slow)
    assert torch.equal(fast.pixels[3], torch.from_numpy(pictures[fast.indices[3]]).permute(2, 0, 1))


@pytest.mark.parametrize("resize", ["tf2", "tf1"])
@pytest.mark.parametrize("side", [8, 20])
def test_host_and_device_crops_make_equal_views(
    pictures: NDArray[np.uint8], resize: str, side: int
) -> None:
    settings = ViewSettings(image_size=side, resize=resize)
    views = [
        make_views(batch.pixels, batch.draws, settings, device=CPU)
        for batch in (
            walked(source, settings=settings)
            for source in (ArraySource(pictures, np.arange(12)), Single(pictures))
        )
    ]
    assert views[0].shape == (84, 3, side, side)
    torch.testing.assert_close(views[0], views[1], rtol=0, atol=2e-6)


def test_every_epoch_shows_each_image_once_in_another_order(
    pictures: NDArray[np.uint8],
) -> None:
    chosen = np.array([1, 2, 5, 6, 9])
    source = ArraySource(pictures, np.arange(12))
    seen = walked(source, indices=chosen, steps=5, global_batch=4).indices.reshape(4, 5)
    assert torch.equal(seen.sort(dim=1).values, torch.from_numpy(chosen).expand(4, 5))
    assert len({tuple(epoch.tolist()) for epoch in seen}) > 1


def test_labels_may_be_hidden(pictures: NDArray[np.uint8]) -> None:
    labels = np.where(np.arange(12) < 4, np.arange(12), -1)
    for source in (ArraySource(pictures, np.arange(12)), Single(pictures)):
        batch = walked(source, labels=labels)
        assert torch.equal(batch.labels, torch.from_numpy(labels)[batch.indices])


def test_split_and_join_are_opposites(pictures: NDArray[np.uint8]) -> None:
    for source in (ArraySource(pictures, np.arange(12)), Single(pictures)):
        batch = walked(source)
        pieces = batch.split(16)
        assert [len(piece) for piece in pieces] == [16, 16, 10]
        assert torch.equal(Batch.join(pieces).pixels, batch.pixels)
        assert view_hash(Batch.join(pieces)) == view_hash(batch)
        assert view_hash(pieces[0]) != view_hash(batch)


def test_another_seed_is_another_stream(pictures: NDArray[np.uint8]) -> None:
    source = ArraySource(pictures, np.arange(12))
    assert view_hash(walked(source, seed=1)) != view_hash(walked(source, seed=2))


def test_unreadable_images_are_replaced_the_same_everywhere(
    pictures: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    source = Single(pictures, broken=(2, 7))
    reader = loader(source, unreadable_limit=0.2)
    straight = Batch.join(list(reader.batches(0, 6)))
    assert reader.unreadable == {
        "image-000002": "broken on purpose",
        "image-000007": "broken on purpose",
    }
    assert caplog.text.count("image-000002 cannot be read and is replaced (") == 1
    intact = walked(Single(pictures))
    wrong = (intact.indices == 2) | (intact.indices == 7)
    assert wrong.sum() >= 6
    assert torch.equal(straight.indices[~wrong], intact.indices[~wrong])
    assert not set(straight.indices.tolist()) & {2, 7}
    assert torch.equal(straight.labels, straight.indices)
    for options in ({"workers": 2}, {"workers": 1, "first": 7, "steps": 5}):
        again = walked(source, unreadable_limit=0.2, **options)
        assert torch.equal(again.indices, straight.indices[-len(again) :])
        assert torch.equal(again.pixels, straight.pixels[:, -len(again) :])
    ranks = [
        loader(source, unreadable_limit=0.2, rank=rank, world_size=2).batches(0, 6)
        for rank in (0, 1)
    ]
    pieces = [piece for step in zip(*ranks, strict=True) for piece in step]
    assert view_hash(Batch.join(pieces)) == view_hash(straight)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(pictures: NDArray[np.uint8], workers: int) -> None:
    source = Single(pictures, broken=(2, 7))
    with pytest.raises(
        DataError,
        match=r"^2 of 12 images \(16\.67%\) cannot be read, first image-00000[27]: broken on "
        r"purpose\. input\.unreadable_limit=0\.001 allows 1: repair or remove them, or raise it$",
    ):
        walked(source, steps=12, workers=workers)
    with pytest.raises(DataError, match="1 of 12 images"):
        walked(Single(pictures, broken=(2,)), steps=12, unreadable_limit=0.0, workers=workers)
    assert walked(Single(pictures, broken=(2,)), steps=12) is not None


def test_no_readable_image_at_all_is_an_error(pictures: NDArray[np.uint8]) -> None:
    source = Single(pictures, broken=tuple(range(12)))
    with pytest.raises(DataError, match="no readable image"):
        walked(source, unreadable_limit=1.0)
    with pytest.raises(DataError, match="no images to train on"):
        loader(source, indices=np.zeros(0, np.int64))


def test_substitutes_come_from_the_subset() -> None:
    order = Order(indices=np.array([3, 8, 10]), seed=1)
    drawn = [order.substitute(epoch=0, index=3, attempt=attempt) for attempt in range(40)]
    assert set(drawn) == {3, 8, 10}
    assert drawn != [order.substitute(epoch=1, index=3, attempt=attempt) for attempt in range(40)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_shows_each_image_once(pictures: NDArray[np.uint8], workers: int) -> None:
    chosen = np.array([4, 0, 11, 3, 7])
    for source in (ArraySource(pictures, np.arange(12)), Single(pictures)):
        batches = list(
            evaluation_batches(
                source, indices=chosen, settings=DISTORT, batch_size=2, means=Means(workers=workers)
            )
        )
        assert [len(batch) for batch in batches] == [2, 2, 1]
        whole = Batch.join(batches)
        assert whole.indices.tolist() == whole.labels.tolist() == chosen.tolist()
        assert whole.draws.views == 1
        assert not whole.draws.flip.any()
        assert make_views(whole.pixels, whole.draws, DISTORT, device=CPU).shape == (5, 3, 8, 8)


def test_evaluation_leaves_out_what_it_cannot_read(
    pictures: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    source, everything = Single(pictures, broken=(2, 3, 5)), np.arange(12)
    batches = evaluation_batches(
        source, indices=everything, settings=DISTORT, batch_size=2, unreadable_limit=0.25
    )
    shown = [batch.indices.tolist() for batch in batches]
    assert shown == [[0, 1], [4], [6, 7], [8, 9], [10, 11]]
    told = "image-000003 cannot be read and is left out (2 of at most 3): broken on purpose"
    assert told in caplog.text
    with pytest.raises(DataError, match="3 of 12 images"):
        list(
            evaluation_batches(
                source, indices=everything, settings=DISTORT, batch_size=2, unreadable_limit=0.1
            )
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_tells_its_caller_what_it_leaves_out(
    pictures: NDArray[np.uint8], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    everything = np.arange(12)
    told = {"image-000005": "known before"}
    for source, left in (
        (Single(pictures, broken=(2, 3, 5)), [0, 1, 4, 6, 7, 8, 9, 10, 11]),
        (Single(pictures, broken=tuple(range(12))), []),
    ):
        batches = evaluation_batches(
            source,
            indices=everything,
            settings=DISTORT,
            batch_size=2,
            means=Means(workers=workers),
            unreadable_limit=1.0,
            unreadable=told,
        )
        assert [index for batch in batches for index in batch.indices.tolist()] == left
        assert set(told.values()) == {"broken on purpose"}
        if left:
            assert sorted(told) == ["image-000002", "image-000003", "image-000005"]
            assert "image-000002 cannot be read and is left out: broken" in caplog.text
    assert len(told) == 12
    assert len(caplog.records) == 11


def test_no_image_is_said_to_be_left_out_when_the_run_stops(
    pictures: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    told: dict[str, str] = {}
    with pytest.raises(DataError, match=r"unreadable_limit=0 allows 0"):
        list(
            evaluation_batches(
                Single(pictures, broken=(2,)),
                indices=np.arange(12),
                settings=DISTORT,
                batch_size=2,
                unreadable_limit=0.0,
                unreadable=told,
            )
        )
    assert told == {"image-000002": "broken on purpose"}
    assert not caplog.records
    with pytest.raises(DataError, match="2 of 12 images"):
        walked(Single(pictures, broken=(2, 7)), steps=12)
    assert [record.getMessage().split(":")[0] for record in caplog.records] in (
        ["image-000002 cannot be read and is replaced (1 of at most 1)"],
        ["image-000007 cannot be read and is replaced (1 of at most 1)"],
    )


def test_the_death_of_a_worker_is_named(pictures: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match="a process that reads images died"):
        walked(Single(pictures, deadly=4), workers=1)


def test_global_generators_are_left_alone(pictures: NDArray[np.uint8]) -> None:
    def states() -> list[str]:
        legacy = np.random.get_state()  # noqa: NPY002 - this is the generator to be left alone
        return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(legacy)]

    before = states()
    for workers in (0, 2):
        walked(Single(pictures, broken=(1,)), workers=workers)
    walked(ArraySource(pictures, np.arange(12)))
    assert states() == before


def test_a_stream_that_is_left_early_ends_its_workers(pictures: NDArray[np.uint8]) -> None:
    import multiprocessing

    stream = loader(Single(pictures), workers=2).batches(0, 1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_large_batches_travel_in_chunks(tmp_path: Path, png: Encode) -> None:
    for number in range(3):
        pixels = np.full((40, 30 + number, 3), number, np.uint8)
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    source = training_folder(tmp_path, ".", labelled=False)
    settings = ViewSettings(image_size=224)
    batch = next(loader(source, settings=settings, global_batch=30, workers=2).batches(0, 1))
    assert batch.pixels.shape == (2, 30, 3, 224, 224)
    expected = (batch.indices.float() / 255)[None, :, None, None, None].expand_as(batch.pixels)
    torch.testing.assert_close(batch.pixels, expected, rtol=0, atol=1e-6)


def test_workers_die_with_a_killed_training_process(tmp_path: Path, png: Encode) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        pixels = np.full((9, 9, 3), 20 * number, dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(png(pixels))
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, numpy as np, os, signal\n"
        "from bigsimclr.augment import ViewSettings\n"
        "from pathlib import Path\n"
        "from bigsimclr.data.folder import training_folder\n"
        "from bigsimclr.data.loader import Loader\n"
        "from bigsimclr.data.steps import Means\n"
        f"source = training_folder(Path({str(folder)!r}), '.', labelled=False)\n"
        "settings = ViewSettings(image_size=8, crop_area=(0.5, 1.0), flip_probability=0.5)\n"
        "loader = Loader(source, indices=np.arange(len(source)), labels=source.labels,\n"
        "    settings=settings, views=2, seed=0, global_batch=64, means=Means(workers=2))\n"
        "batches = loader.batches(0, 1000)\n"
        "next(batches)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        workers = [int(word) for word in killed.stdout.readline().split()]
        assert killed.wait() == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 60  # one may still be importing, on a busy machine
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)


def killed(folder: Path, png: Encode, *, deaths: int, pause: float, limit: float) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 48, 48, 3), dtype=np.uint8)
    for number, pixels in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(png(pixels))
    words = ["-m", "tests.data.kills", str(folder), "1", str(deaths), str(pause)]
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,  # nothing may hang
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert set(found["endings"]) == {"same"}, found
    assert len(found["logged"]) == deaths
    assert len(found["logged"]) <= found["killed"]
    assert all(re.search("died by SIG(KILL|SEGV) and was replaced", one) for one in found["logged"])
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_killed_workers_are_replaced_and_change_nothing(
    tmp_path: Path, png: Encode, pause: float
) -> None:
    killed(tmp_path, png, deaths=6, pause=pause, limit=300)


@pytest.mark.long
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_fifty_killed_workers_change_nothing(tmp_path: Path, png: Encode, pause: float) -> None:
    killed(tmp_path, png, deaths=50, pause=pause, limit=1500)


def test_a_stream_that_nobody_closes_does_not_keep_the_process(tmp_path: Path) -> None:
    script = tmp_path / "left.py"
    script.write_text(
        "import numpy as np\n"
        "from bigsimclr.augment import ViewSettings\n"
        "from bigsimclr.data.arrays import ArraySource\n"
        "from bigsimclr.data.chunks import ChunkReader, Reading\n"
        "from bigsimclr.data.order import Cut, Order\n"
        "from bigsimclr.data.slots import Slots\n"
        "from bigsimclr.data.workers import from_workers\n"
        "source, every = ArraySource(np.zeros((9, 9, 9, 3), np.uint8)), np.arange(9)\n"
        "reading = Reading(source=source, order=Order(indices=every, seed=0), indices=every,\n"
        "    labels=source.labels, settings=ViewSettings(image_size=8), views=2, max_pixels=99)\n"
        "cut = Cut(first_example=0, step_examples=4, low=0, high=4, chunk=4)\n"
        "slots = Slots(4, (2, 4, 3, 8, 8))\n"
        "for step in range(4):\n"
        "    slots.open(step)\n"
        "stream = from_workers(ChunkReader(reading, cut, 99, slots), 99, workers=2, ahead=4)\n"
        "print(len(next(stream).indices))\n"
        "kept = [stream]\n"
        "kept.append(kept)\n"
        "raise RuntimeError('an error that nobody expects')\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.stdout == "4\n"
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: an error that nobody expects\n")


def test_an_unexpected_error_of_a_worker_is_raised_with_its_place(
    pictures: NDArray[np.uint8],
) -> None:
    class Failing(Single):
        def read(self, index: int) -> Sample:
            raise ZeroDivisionError(f"of all things, {index}")

    with pytest.raises(
        RuntimeError, match=r"^ZeroDivisionError while reading images: of all things"
    ) as raised:
        walked(Failing(pictures), workers=2)
    assert "in read" in "".join(raised.value.__notes__)


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
