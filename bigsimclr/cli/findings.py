"""What was found in a data set, as lines of text."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

from bigsimclr.data.measure import Statistics
from bigsimclr.data.names import counted, printable
from bigsimclr.data.scan import Broken, Copy, Group, Scan, Spread

T = TypeVar("T")

_WIDTH = 12
_MOST_SUFFIXES = 6  # of files that are not read
_MOST_CLASSES = 12  # named with their number of images

_TRAIT_NOTES = {
    "turned by EXIF": "shown as stored, as TensorFlow does",
    "several frames": "the first is used",
    "16 bits or more": "brought to 8",
    "colour profile": "ignored",
    "wrong suffix": "read by content",
}


def scan_text(found: Scan, *, shown: int, bits: int) -> str:
    """Write what a scan found.

    Args:
        found: the scan.
        shown: most images that are named under each heading.
        bits: most bits in which images alike differ.
    """
    images = found.train.images + (found.held_out.images if found.held_out else 0)
    lines = [
        row("images", f"{images:,}: {groups_text(found.train, found.held_out)}"),
        row("broken", f"{len(found.broken):,}"),
        *named_few(found.broken, shown, _broken),
        *_skipped_line(found.skipped),
        row("formats", tally(found.formats)),
        row("modes", tally(found.modes)),
    ]
    lines += [
        row("note", f"{count:,} of them: {trait} ({_TRAIT_NOTES[trait]})")
        for trait, count in found.traits.items()
    ]
    lines += [*sizes(found.width, found.height, found.bytes), *_class_lines(found)]
    alike = f"at most {bits} of 64 bits of a perceptual hash apart"
    kinds = (
        ("copies", found.copies, "training images", "with the bytes of an earlier one", ""),
        ("alike", found.alike, "training images", "that look like an earlier one", alike),
        ("leaks", found.leaks, "held-out images", "with the bytes of a training image", ""),
        ("leaks", found.leaks_alike, "held-out images", "that look like a training image", alike),
    )
    for heading, copies, who, what, how in kinds:
        if heading == "leaks" and found.held_out is None:
            continue
        other = sum(not copy.is_same_class for copy in copies)
        notes = [f"{other:,} of another class"] * bool(other) + [how] * bool(how)
        note = f" ({'; '.join(notes)})" if notes else ""
        lines.append(row(heading, f"{len(copies):,} {who} {what}{note}"))
        lines += named_few(copies, shown, _copy)
    if found.not_compared:
        lines.append(row("", f"{found.not_compared:,} too small or too plain to compare by look"))
    return "\n".join(lines)


def statistics_text(found: Statistics) -> str:
    """Write what was measured."""
    apart = f"{found.held_out:,} held out" if found.held_out else "none held out"
    several = counted(found.measured, "image")
    lines = [
        row("images", f"{found.images:,} for training, {apart}"),
        row("measured", f"{found.measured:,}, {found.bytes:,} bytes"),
        *([row("", f"{found.unreadable:,} cannot be read")] if found.unreadable else []),
        *sizes(found.width, found.height, found.size),
        *_class_line(found.classes),
        row("mean", f"{_channels(found.mean)} (red, green, blue of 0 to 1; over all pixels)"),
        row("deviation", _channels(found.deviation)),
    ]
    if found.decoded_per_core_second is not None:
        speed = f"{found.decoded_per_core_second:,.0f} images a second on one core"
        lines.append(
            row("decoding", f"{speed}: {several} in {found.decode_seconds:.3g} s of its time here")
        )
    lines.append(row("fingerprint", f"{found.fingerprint} (training)"))
    if found.held_out:
        lines.append(row("", f"{found.held_out_fingerprint} (held out)"))
    return "\n".join(lines)


def verdict(found: Scan) -> str:
    """Say in one line why the exit code is not 0."""
    leaks = len(found.leaks) + len(found.leaks_alike)
    parts = [f"{counted(len(found.broken), 'broken image')}"] * bool(found.broken)
    parts += [f"{counted(leaks, 'held-out image')} among the training images"] * bool(leaks)
    return " and ".join(parts)


def row(heading: str, text: str) -> str:
    """Write one line of a table of two columns."""
    return f"{heading:<{_WIDTH}}{text}".rstrip()


def groups_text(train: Group, held_out: Group | None) -> str:
    """Say how many images are for training and how many are held out."""
    apart = "none held out" if held_out is None else f"{held_out.images:,} held out"
    return f"{train.images:,} for training, {apart}"


def named_few(items: Sequence[T], shown: int, text: Callable[[T], str]) -> list[str]:
    """Write the first few of some findings below their heading."""
    lines = [f"  {text(item)}" for item in islice(items, shown)]
    rest = len(items) - len(lines)
    return [*lines, f"  and {rest:,} more"] if lines and rest else lines


def tally(counts: dict[str, int]) -> str:
    """Write how often each of some things was seen."""
    return ", ".join(f"{count:,} {printable(name)}" for name, count in counts.items()) or "none"


def sizes(width: Spread | None, height: Spread | None, size: Spread | None) -> list[str]:
    """Write the sizes of images in pixels and of their files in bytes."""
    rows = (("width", width, "pixels"), ("height", height, "pixels"), ("size", size, "bytes"))
    return [
        row(heading, f"{of.least:,} to {of.most:,} {unit}, median {of.median:,.0f}")
        for heading, of, unit in rows
        if of is not None
    ]


def _skipped_line(skipped: dict[str, int]) -> list[str]:
    if not skipped:
        return []
    count = counted(sum(skipped.values()), "file")
    most = list(skipped.items())[:_MOST_SUFFIXES]
    more = ", ..." * (len(skipped) > len(most))
    suffixes = ", ".join(f"{printable(suffix)} {number:,}" for suffix, number in most)
    return [row("skipped", f"{count} by their suffix: {suffixes}{more}")]


def _class_lines(found: Scan) -> list[str]:
    """Write the classes with their numbers of images, and those that have none."""
    lines = _class_line(found.train.classes)
    for who, group in (("training", found.train), ("held-out", found.held_out)):
        bare = [] if group is None else [name for name, count in group.classes.items() if not count]
        if bare:
            some = ", ".join(printable(name) for name in bare[:_MOST_CLASSES])
            more = f" and {len(bare) - _MOST_CLASSES:,} more" * (len(bare) > _MOST_CLASSES)
            count = counted(len(bare), "class", "classes")
            lines.append(row("", f"{count} without {who} images: {some}{more}"))
    return lines


def _class_line(counts: dict[str, int]) -> list[str]:
    if not counts:
        return [row("classes", "none: the images have no labels")]
    least, most = min(counts.values()), max(counts.values())
    text = f"{len(counts):,}, each {least:,}" + (f" to {most:,}" * (most > least)) + " images"
    if len(counts) <= _MOST_CLASSES and most > least:
        text += f" ({tally(counts)})"
    return [row("classes", text)]


def _channels(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _broken(item: Broken) -> str:
    place = "" if item.part == "train" else f" ({item.part})"
    return f"{printable(item.name)}{place}: {printable(item.reason)}"


def _copy(item: Copy) -> str:
    apart = "" if item.bits is None else f" ({counted(item.bits, 'bit')} apart)"
    return f"{printable(item.name)} = {printable(item.of)}{apart}"
