"""Several sources as one: their images behind each other, seen in given shares."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bigsimclr.data import Choosy, Sample, Source
from bigsimclr.data.names import fingerprint, some
from bigsimclr.data.order import Arranged, Mixture, Part
from bigsimclr.errors import DataError

Integers = NDArray[np.int64]


class Mixed:
    """Read images of several sources by one index; build one with `mixed`."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        classes: tuple[str, ...],  # of all sources; each source's own are among them
        weights: Sequence[float] | None,  # shares of the examples seen; None: as many as there are
        beside: Sequence[Source] = (),  # sources that are shown elsewhere
    ) -> None:
        self.classes = classes
        self.labels = np.concatenate([_relabelled(source, classes) for source in sources])
        self.image_size: tuple[int, int] | None = None
        shares = [] if weights is None else [np.array(weights, np.float64).tobytes()]
        self.fingerprint = fingerprint(
            [
                *(source.fingerprint.encode() for source in sources),
                *map(os.fsencode, classes),
                *shares,
            ]
        )
        self.sources = sources
        self._starts = np.cumsum([0, *map(len, sources)])
        self.arrangement = None if weights is None else self._mixture(weights)
        self._is_numbered = not _are_unique(sources)
        self.left_out: Mapping[str, str] = self._left_out(beside)  # name -> reason
        self.skipped: Mapping[str, int] = self._skipped(beside)  # suffix -> files

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        """Name image `index` as its source does; behind the source's number if that is doubtful."""
        number, within = self._place(index)
        return self._named(number, self.sources[number].name(within))

    def read(self, index: int) -> Sample:
        """Read image `index`.

        Raises:
            OSError: it cannot be read.
            DataError: its source says why.
        """
        number, within = self._place(index)
        image = self.sources[number].read(within).image
        return Sample(image=image, label=int(self.labels[index]), index=index)

    def _named(self, number: int, name: str) -> str:
        return f"{number}/{name}" if self._is_numbered else name

    def _left_out(self, beside: Sequence[Source]) -> dict[str, str]:
        """Join what sources left out; two parts of one folder know the same entries."""
        known = {id(source.left_out) for source in beside if isinstance(source, Choosy)}
        return {
            self._named(number, name): reason
            for number, source in enumerate(self.sources)
            if isinstance(source, Choosy) and id(source.left_out) not in known
            for name, reason in source.left_out.items()
        }

    def _skipped(self, beside: Sequence[Source]) -> Counter[str]:
        """Add up what sources skipped; two parts of one folder know the same files."""
        known = {id(source.skipped) for source in beside if isinstance(source, Choosy)}
        total: Counter[str] = Counter()
        for source in self.sources:
            if isinstance(source, Choosy) and id(source.skipped) not in known:
                total.update(source.skipped)
        return total

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _mixture(self, weights: Sequence[float]) -> Mixture:
        starts = self._starts.tolist()
        return Mixture(
            tuple(
                Part(
                    start=start,
                    stop=stop,
                    share=weight,
                    arrangement=source.arrangement if isinstance(source, Arranged) else None,
                )
                for source, weight, start, stop in zip(
                    self.sources, weights, starts, starts[1:], strict=False
                )
            )
        )


def mixed(sources: Sequence[Source], weights: Sequence[float | None]) -> Mixed:
    """Join training images; classes of one name are one class, numbered as they first come.

    Args:
        sources: the sources.
        weights: share of each in the examples seen, in proportion; all None: as many as there are.

    Raises:
        DataError: a source holds two classes of one name.
    """
    classes = tuple(dict.fromkeys(name for source in sources for name in source.classes))
    given = [weight for weight in weights if weight is not None]
    return Mixed(sources, classes=classes, weights=given if len(given) == len(sources) else None)


def one_behind_the_other(sources: Sequence[Source], training: Mixed) -> Mixed:
    """Join held-out images, with the classes of the training images.

    Raises:
        DataError: a class is not among the training images.
    """
    return Mixed(sources, classes=training.classes, weights=None, beside=training.sources)


def _relabelled(source: Source, classes: tuple[str, ...]) -> Integers:
    numbers = {name: number for number, name in enumerate(classes)}
    if len(set(source.classes)) < len(source.classes):
        raise DataError("data.sources: a source has several classes of one name")
    unknown = [name for name in source.classes if name not in numbers]
    if unknown:
        raise DataError(
            f"data.sources: held-out images have classes without training images: {some(unknown)}"
        )
    table = np.array([*(numbers[name] for name in source.classes), -1], np.int64)
    return table[source.labels]  # -1 takes the last place, which is -1


def _are_unique(sources: Sequence[Source]) -> bool:
    names = {source.name(index) for source in sources for index in range(len(source))}
    return len(names) == sum(map(len, sources))
