from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.data import build_data
from bigsimclr.data.arrays import ArraySource, digits
from bigsimclr.data.subsets import (
    held_out_count,
    read_list,
    select_labels,
    split_held_out,
    subset_hash,
    write_list,
)
from bigsimclr.errors import DataError
from bigsimclr.recipe.sources import DigitsData

COUNTS = (50, 7, 200, 13, 1)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))


class Named(ArraySource):
    """A source whose names are given."""

    def __init__(self, names: list[str], labels: np.ndarray, classes: int) -> None:
        images = np.zeros((len(names), 1, 1, 3), np.uint8)
        super().__init__(images, labels, classes=tuple(f"c{i}" for i in range(classes)))
        self.given = names

    def name(self, index: int) -> str:
        return self.given[index]


def source(labels: np.ndarray = LABELS) -> Named:
    return Named([f"{number}.png" for number in range(len(labels))], labels, int(labels.max()) + 1)


@pytest.mark.parametrize("amount", [1, 3, 7])
def test_per_class_takes_so_many_of_each(amount: int) -> None:
    labels = LABELS[LABELS != 4]
    chosen = select_labels(source(labels), per_class=amount, draw=3)
    assert np.bincount(labels[chosen]).tolist() == [amount] * 4
    assert np.array_equal(chosen, np.unique(chosen))


@pytest.mark.parametrize("draw", range(5))
def test_amounts_nest_within_a_draw(draw: int) -> None:
    labels = LABELS[LABELS != 4]
    by_class = [set(select_labels(source(labels), per_class=k, draw=draw)) for k in range(1, 8)]
    assert all(few < more for few, more in pairwise(by_class))
    amounts = [0.5, 1, 2, 3, 5, 8, 10, 15, 20, 33, 50, 75, 99, 100]
    by_share = [set(select_labels(source(), percent=p, draw=draw)) for p in amounts]
    assert all(few <= more for few, more in pairwise(by_share))


def test_draws_differ() -> None:
    drawn = {tuple(select_labels(source(), percent=10, draw=draw)) for draw in range(8)}
    assert len(drawn) == 8


@pytest.mark.parametrize("percent", [5, 10, 37.5, 60, 100])
def test_percent_keeps_the_proportions(percent: float) -> None:
    chosen = select_labels(source(), percent=percent)
    counts = np.bincount(LABELS[chosen], minlength=5)
    assert len(chosen) == int(len(LABELS) * percent / 100)
    assert counts.min() >= 1
    # Two small classes are shown more than their share here, which the large ones make up for.
    assert np.abs(counts - np.array(COUNTS) * percent / 100).max() <= 2


def test_percent_shows_at_least_one_of_each_class() -> None:
    assert sorted(LABELS[select_labels(source(), percent=0.1)]) == [0, 1, 2, 3, 4]


def test_one_percent_of_imagenet_is_as_large_as_the_official_list() -> None:
    labels = np.sort(np.arange(1_281_167) % 1000)
    assert len(select_labels(source_of(labels), percent=1)) == 12_811


def source_of(labels: np.ndarray) -> ArraySource:
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    return ArraySource(images, labels, classes=tuple(str(i) for i in range(1000)))


def test_hidden_labels_are_never_chosen() -> None:
    labels = np.where(np.arange(len(LABELS)) % 2 == 0, LABELS, -1)
    chosen = select_labels(source(labels), percent=100)
    assert np.array_equal(chosen, np.flatnonzero(labels >= 0))


def test_too_few_images_name_the_class() -> None:
    with pytest.raises(
        DataError,
        match=r"^labels\.per_class: class 'c4' has 1 training image, 2 per class are asked for$",
    ):
        select_labels(source(), per_class=2)
    with pytest.raises(DataError, match="no labels"):
        select_labels(Named(["a"], np.array([-1]), 0), percent=1)
    for wrong in ({}, {"per_class": 1, "percent": 1.0}):
        with pytest.raises(ValueError, match="one of"):
            select_labels(source(), **wrong)


@pytest.mark.parametrize(
    ("kept", "rest"),
    [
        (0, r"0 training images, 1 per class is asked for; 3 more are held out \(data\.held_out\)"),
        (1, r"1 training image, 2 per class are asked for; 2 more are held out \(data\.held_out\)"),
        (2, r"2 training images, 3 per class are asked for; 1 more is held out \(data\.held_out\)"),
        (3, r"3 training images, 4 per class are asked for"),
    ],
)
def test_too_few_images_say_that_the_rest_is_held_out(kept: int, rest: str) -> None:
    train = Named([f"{i}" for i in range(9 + kept)], np.array([0] * 9 + [1] * kept), 2)
    apart = Named([f"h{i}" for i in range(3 - kept)], np.full(3 - kept, 1), 2)
    with pytest.raises(DataError, match=rf"^labels\.per_class: class 'c1' has {rest}$"):
        select_labels(train, per_class=kept + 1, held_out=apart, held_out_keys="data.held_out")


def test_listed_images_that_are_held_out_are_called_so() -> None:
    train = Named(["n01/a.JPEG", "n01/b.JPEG"], np.array([0, 0]), 1)
    apart = Named(["n01/c.JPEG", "n01/d.JPEG"], np.array([0, 0]), 1)
    listed, path = ["a.JPEG", "c.JPEG", "n01/d.JPEG", "none.JPEG"], Path("few\n.txt")
    with pytest.raises(
        DataError,
        match=r"^labels\.list: few\\n\.txt: 2 listed images are held out"
        r" \(data\.held_out_fraction, data\.split_seed\): c\.JPEG, n01/d\.JPEG;"
        r" draw the list with the same data keys$",
    ):
        select_labels(train, names=listed, list_path=path, held_out=apart)
    with pytest.raises(DataError, match=r"1 listed image is held out \(.*\): c\.JPEG;"):
        select_labels(train, names=listed[:2], held_out=apart)
    with pytest.raises(
        DataError, match=r"^labels\.list: 1 listed name is not among the images: none\.JPEG$"
    ):
        select_labels(train, names=[listed[3]], held_out=apart)


def test_a_list_of_another_split_names_the_keys() -> None:
    section = DigitsData(kind="digits", held_out_fraction=0.5)
    splits, whole = build_data(section), digits()
    names = [whole.name(index) for index in range(20)]
    with pytest.raises(DataError, match=r"held out \(data\.held_out_fraction, data\.split_seed\)"):
        select_labels(
            splits.train,
            names=names,
            held_out=splits.held_out,
            held_out_keys=splits.held_out_keys,
        )


def test_lists_match_names_and_file_names() -> None:
    names = ["n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/same.JPEG", "n01/same.JPEG"]
    images = Named(names, np.array([0, 0, 1, 1, -1]), 2)
    listed = ["n02_1.JPEG", "n01/n01_1.JPEG", "n02_1.JPEG"]
    assert select_labels(images, names=listed).tolist() == [0, 2]
    assert select_labels(images, names=["n02/same.JPEG"]).tolist() == [3]
    with pytest.raises(DataError, match=r"4 listed names .* a, b\\x1b, c, \.\.\."):
        select_labels(images, names=["a", "b\x1b", "c", "d", "n01_1.JPEG"])
    with pytest.raises(DataError, match=r"1 listed name stands for several images: same\.JPEG"):
        select_labels(images, names=["same.JPEG"])
    with pytest.raises(DataError, match=r"1 listed image has no label: n01/same\.JPEG"):
        select_labels(images, names=["n01/same.JPEG"])
    with pytest.raises(DataError, match="empty"):
        select_labels(images, names=[])


def test_lists_are_written_and_read_back(tmp_path: Path) -> None:
    names = ["a/b c.png", "é.png", "\udcff.png"]
    write_list(tmp_path / "labels.txt", names)
    assert read_list(tmp_path / "labels.txt") == names
    (tmp_path / "official.txt").write_text("n01_1.JPEG\r\n\nn02_7.JPEG\n")
    assert read_list(tmp_path / "official.txt") == ["n01_1.JPEG", "n02_7.JPEG"]
    with pytest.raises(DataError, match="line breaks"):
        write_list(tmp_path / "bad.txt", ["a\nb"])


def test_a_list_that_is_no_file_names_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=r"^labels\.list: none\.txt does not exist \(relative to the current directory\);"
        r" give a list of image names with labels\.list=FILE$",
    ):
        read_list(Path("none.txt"))
    with pytest.raises(DataError, match=rf"^other: {tmp_path} is a folder, not a file$"):
        read_list(tmp_path, key="other")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "few.txt").write_text("a.png\n")
    assert read_list(Path("~/few.txt")) == ["a.png"]


def test_the_hash_is_of_the_set() -> None:
    assert subset_hash(["b", "a"]) == subset_hash(["a", "b"]) != subset_hash(["a", "c"])
    assert len(subset_hash(["\udcff"])) == 64


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.99, 0.9999])
def test_splits_are_disjoint_and_in_proportion(fraction: float) -> None:
    train, apart = split_held_out(LABELS, fraction=fraction, seed=4)
    assert np.array_equal(np.sort(np.concatenate([train, apart])), np.arange(len(LABELS)))
    assert len(apart) == held_out_count(len(LABELS), fraction)
    assert len(train) >= 1
    counts = np.bincount(LABELS[apart], minlength=5)
    assert np.abs(counts - np.array(COUNTS) * fraction).max() <= 1.5


def test_unlabelled_images_are_split_too() -> None:
    train, apart = split_held_out(np.full(10, -1), fraction=0.3, seed=0)
    assert (len(train), len(apart)) == (7, 3)
