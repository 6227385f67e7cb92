"""Bad and odd images on their way through decoding, folders, the loader, and the scan."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.data.decode import UnreadableImageError, decode
from bigsimclr.data.folder import found_folder, training_folder
from bigsimclr.data.loader import Batch, Loader, evaluation_batches, view_hash
from bigsimclr.data.names import printable
from bigsimclr.data.scan import scan
from bigsimclr.data.steps import Means
from tests.data.corpus import MAX_PIXELS, Odd, bomb, images, write_images, write_traps

ODD = images()
SETTINGS = ViewSettings(image_size=8)


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[Odd], dict[str, str]]:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder, write_images(folder), write_traps(folder)


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(ODD) == len({odd.name for odd in ODD}) == 41
    assert sum(odd.pixels is None for odd in ODD) == 12


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_every_kind_is_decoded_by_its_rule_or_refused_with_a_reason(odd: Odd) -> None:
    if odd.pixels is None:
        with pytest.raises(UnreadableImageError, match=odd.reason):
            decode(odd.content, max_pixels=MAX_PIXELS)
        return
    found = decode(odd.content, max_pixels=MAX_PIXELS)
    assert found.shape == odd.pixels.shape
    assert np.abs(found.astype(int) - odd.pixels).max() <= odd.tolerance


def test_a_folder_opens_files_and_nothing_else(
    corpus: tuple[Path, list[Odd], dict[str, str]],
) -> None:
    folder, made, traps = corpus
    source = training_folder(folder, ".", labelled=False)
    assert {source.name(index) for index in range(len(source))} == {odd.name for odd in made}
    assert source.left_out == traps
    contents = {odd.name: odd.content for odd in made}
    for index in range(len(source)):
        assert source.read(index).image == contents[source.name(index)]


def test_the_loader_replaces_what_is_broken_and_names_it(
    corpus: tuple[Path, list[Odd], dict[str, str]],
) -> None:
    folder, made, _ = corpus
    source = training_folder(folder, ".", labelled=False)
    everything = np.arange(len(source))
    broken = {printable(odd.name): odd.reason for odd in made if odd.pixels is None}
    seen = []
    for workers in (0, 2):
        loader = Loader(
            source,
            indices=everything,
            labels=source.labels,
            settings=SETTINGS,
            views=2,
            seed=1,
            global_batch=len(source),
            means=Means(workers=workers),
            unreadable_limit=1.0,
        )
        seen.append(Batch.join(list(loader.batches(0, 2))))
        assert loader.unreadable.keys() == broken.keys()
        for name, reason in loader.unreadable.items():
            assert re.search(broken[name], reason)
    assert view_hash(seen[0]) == view_hash(seen[1])
    assert torch.equal(seen[0].pixels, seen[1].pixels)
    assert torch.isfinite(seen[0].pixels).all()
    names = {source.name(index) for index in seen[0].indices.tolist()}
    assert names == {odd.name for odd in made if odd.pixels is not None}


def test_evaluation_shows_all_that_can_be_read(
    corpus: tuple[Path, list[Odd], dict[str, str]],
) -> None:
    folder, made, _ = corpus
    source = training_folder(folder, ".", labelled=False)
    batches = evaluation_batches(
        source,
        indices=np.arange(len(source)),
        settings=SETTINGS,
        batch_size=16,
        unreadable_limit=1.0,
    )
    shown = [source.name(index) for batch in batches for index in batch.indices.tolist()]
    assert sorted(shown) == sorted(odd.name for odd in made if odd.pixels is not None)


def test_a_scan_tells_of_every_kind(corpus: tuple[Path, list[Odd], dict[str, str]]) -> None:
    folder, made, traps = corpus
    found = scan(found_folder(folder), max_pixels=MAX_PIXELS)
    assert found == scan(found_folder(folder), max_pixels=MAX_PIXELS, workers=2)
    reasons = {item.name: item.reason for item in found.broken}
    expected = {odd.name: odd.reason for odd in made if odd.pixels is None}
    assert reasons.keys() == expected.keys() | traps.keys()
    for name, reason in expected.items():
        assert re.search(reason, reasons[name]), name
    assert {name: reasons[name] for name in traps} == traps
    assert found.traits == dict(Counter(trait for odd in made for trait in odd.traits))
    readable = [odd for odd in made if odd.pixels is not None]
    assert sum(found.formats.values()) == sum(found.modes.values()) == len(readable)
    assert found.formats["MPO"] == 1
    assert found.modes["CMYK"] == 4
    assert found.width is not None
    assert found.height is not None
    assert (found.width.least, found.width.most) == (1, 30_000)
    assert found.height.median == np.median([odd.pixels.shape[0] for odd in readable])
    assert not found.is_clean
    # The four with hard names are one and the same file.
    assert [copy.of for copy in found.copies].count("\x1b[31mred.png") == 3


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    for side in (4_000, 12_000, 20_000):
        (tmp_path / f"{side}.png").write_bytes(bomb(side))
        assert (tmp_path / f"{side}.png").stat().st_size < 60_000
    code = f"""
from pathlib import Path
from bigsimclr.data import Splits
from bigsimclr.data.folder import training_folder
from bigsimclr.data.scan import scan
from bigsimclr.data.steps import Means

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def growth(limit):
    # What was inherited over the fork, or used while importing, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    found = scan(splits, max_pixels=limit)
    return peak() - before, len(found.broken)

splits = Splits(training_folder(Path({str(tmp_path)!r}), ".", labelled=False), None)
print(*growth(15_000_000), *growth(20_000_000))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, broken, decoded, rest = map(int, ended.stdout.split())
    assert (broken, rest) == (3, 2)
    assert refused < 20_000  # KB
    assert decoded > 46_000  # three bytes for each pixel of the smallest; this measure works


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, as those of pytest may not be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_files_closed_to_the_reader_are_named(open_folder: Path) -> None:
    made = [odd for odd in ODD if odd.name in ("grey.png", "palette.png")]
    for odd in made:
        (open_folder / odd.name).write_bytes(odd.content)
    (open_folder / "grey.png").chmod(0)
    owner = os.geteuid()
    if owner == 0:
        os.seteuid(65_534)
    try:
        found = scan(found_folder(open_folder), max_pixels=MAX_PIXELS)
    finally:
        os.seteuid(owner)
    assert [(item.name, item.reason) for item in found.broken] == [
        ("grey.png", "Permission denied")
    ]


@pytest.mark.parametrize("change", ["removed", "emptied", "a folder", "a pipe", "huge"])
def test_what_changes_after_it_was_listed_is_replaced(tmp_path: Path, change: str) -> None:
    for odd in ODD:
        if odd.pixels is not None:
            (tmp_path / odd.name).write_bytes(odd.content)
    source = training_folder(tmp_path, ".", labelled=False)
    path, reason = tmp_path / "grey.png", "No such file"
    path.unlink()
    match change:
        case "emptied":
            path.touch()
            reason = "has 0 bytes, and had 140 when it was listed"
        case "a folder":
            path.mkdir()
            reason = "Is a directory"
        case "a pipe":
            os.mkfifo(path)
            reason = "not a regular file"
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
            reason = r"holds 1099511627776 bytes \(limit 1073741824\)"
    loader = Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=SETTINGS,
        views=1,
        seed=0,
        global_batch=len(source),
        unreadable_limit=0.1,
    )
    (batch,) = loader.batches(0, 1)
    assert len(batch) == len(source)
    assert list(loader.unreadable) == ["grey.png"]
    assert re.search(reason, loader.unreadable["grey.png"])
