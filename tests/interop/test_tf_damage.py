"""Damaged and hostile checkpoints: the numbers of before, or one error, in little memory."""

import gc
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_bundle import open_bundle
from tests.interop import write_bundle as write

SMALL = {
    "base/conv2d/bias": np.array([1.5, -2.0], "float32"),
    "base/conv2d/kernel": np.arange(24, dtype="float32").reshape(2, 3, 4),
    "global_step": np.array(77, "int64"),
    "graph": b"some text",
}
BITS = (0, 1, 5, 7, 8, 31, 32, 40, 62, 63, 64)
EDGES = [(1 << bits) - less for bits in BITS for less in (0, 1)]
MEMORY = 256 << 10  # bytes; the files have less than one thousand


def _contents(prefix: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read everything that can be read."""
    bundle = open_bundle(prefix)
    found = {}
    for name, variable in bundle.variables.items():
        if variable.dtype == "string":
            found[name] = ("string", (), bundle.read_text(name))
        else:
            array = bundle.read(name)
            found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


def _outcome(prefix: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return what was read, or None for the one error; memory stays within bounds."""
    # What a collection would finalise is of earlier tests, and allocates.
    gc.disable()
    tracemalloc.start()
    try:
        return _contents(prefix)
    except CheckpointError:
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.enable()
        assert peak < MEMORY


def _mutate(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    at = chance.randrange(len(content))
    match chance.randrange(5):
        case 0:
            changed[at] ^= 1 << chance.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            changed[at:at] = chance.randbytes(chance.randrange(1, 12))
        case 3:
            del changed[at : at + chance.randrange(1, 12)]
        case _:
            changed[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff"])
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00002", "data-00001-of-00002"])
def test_chance_damage_is_found_or_harmless(tmp_path: Path, suffix: str) -> None:
    """Whatever happens to a file, its numbers are the same or there is an error."""
    prefix, file = tmp_path / "x", tmp_path / f"x.{suffix}"
    write.write_bundle(prefix, SMALL, shards=2, block_bytes=60)
    expected, content, chance = _contents(prefix), file.read_bytes(), random.Random(suffix)
    assert _outcome(prefix) == expected
    errors = 0
    for _ in range(200):
        file.write_bytes(_mutate(content, chance))
        outcome = _outcome(prefix)
        assert outcome in (None, expected)
        errors += outcome is None
    assert errors > 120


@pytest.mark.slow
def test_blocks_with_right_checksums_and_wrong_content(tmp_path: Path) -> None:
    """With checksums computed again, damage reaches the parsers; they must not fall over."""
    prefix, chance = tmp_path / "x", random.Random(1)
    rows, data = write.bundle_files(SMALL)
    content, spans = write.table(rows, block_bytes=60)
    outcomes = set()
    for _ in range(400):
        changed = bytearray(content)
        for start, size in chance.sample(spans, chance.randrange(1, 3)):
            for _ in range(chance.randrange(1, 4)):
                at = start + chance.randrange(size)
                changed[at] = chance.choice([changed[at] ^ 1 << chance.randrange(8), 0, 0x7F, 0xFF])
            changed[start : start + size + 5] = write.sealed(bytes(changed[start : start + size]))
        write.write_files(prefix, bytes(changed), data)
        outcomes.add(_outcome(prefix) is None)
    assert outcomes == {True, False}


def test_rows_with_wrong_content(tmp_path: Path) -> None:
    """Tables are whole here: names and descriptions are wrong in themselves."""
    prefix, chance = tmp_path / "x", random.Random(2)
    rows, data = write.bundle_files(SMALL)
    for _ in range(300):
        changed = list(rows)
        at = chance.randrange(len(rows))
        key, value = rows[at]
        if chance.random() < 0.3:
            changed[at] = (_mutate(key, chance) if key else b"\1", value)
        else:
            changed[at] = (key, _mutate(value, chance))
        write.write_files(prefix, write.table(changed)[0], data)
        _outcome(prefix)


def test_fields_at_the_edges(tmp_path: Path) -> None:
    """Sizes, places and shapes at the limits of every integer type."""
    prefix, chance = tmp_path / "x", random.Random(3)
    rows, data = write.bundle_files(SMALL)
    for _ in range(300):
        changed = list(rows)
        at = chance.randrange(1, len(rows))
        # The last of several fields of a number counts.
        extra = write.integer(chance.choice([1, 3, 4, 5, 6]), chance.choice(EDGES))
        if chance.random() < 0.5:
            side = write.message(2, write.integer(1, chance.choice(EDGES)))
            extra = write.message(2, side * chance.randrange(1, 40))
        changed[at] = (rows[at][0], rows[at][1] + extra)
        write.write_files(prefix, write.table(changed)[0], data)
        _outcome(prefix)


def test_memory_has_a_bound(tmp_path: Path) -> None:
    """Neither declared sizes nor long keys make a process large."""
    array = write.entry(write.NUMBERS["float32"], (2**40,), size=2**42)
    text = write.entry(write.NUMBERS["string"], (), size=2**40)
    write.write_entries(tmp_path / "array", [(b"a", array)])
    write.write_entries(tmp_path / "text", [(b"a", text)])
    # Each key has eight bytes of its own, and 1016 of the one before.
    keys = b"\0\0" + write.varint(len(write.header())) + write.header()
    keys += b"\0" + write.varint(1016) + b"\0" + b"a" * 1016
    keys += b"".join(write.varint(1016) + b"\x08\0%08d" % number for number in range(70_000))
    index = write.table_of(keys + write.NO_RESTARTS)
    write.write_files(tmp_path / "keys", index, [b""])
    script = """
import resource, sys
from pathlib import Path
from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_bundle import open_bundle
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
for name in ("array", "text", "keys"):
    try:
        open_bundle(Path(sys.argv[1]) / name)
    except CheckpointError as error:
        print(error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of a process is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    complaints = done.stdout.splitlines()
    assert "24 bytes, but 'a' ends at 4398046511104" in complaints[0]
    assert "24 bytes, but 'a' ends at 1099511627776" in complaints[1]
    assert "has more than 65536 variables" in complaints[2]
    assert len(complaints) == 3
