"""Tar headers by offset, against Python's tarfile and the tar program, and hostile archives."""

import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from bigsimclr.data.tar_members import (
    OtherMember,
    TarFile,
    TarMember,
    open_regular,
    read_at,
    tar_header,
    tar_padding,
)
from bigsimclr.errors import DataError
from tests.data.tars import add, write_tar

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def listed(path: Path) -> list[TarMember | OtherMember]:
    descriptor, size = open_regular(path)
    try:
        return list(TarFile(descriptor, size, path.name).members())
    finally:
        os.close(descriptor)


def regular(path: Path) -> list[tuple[str, int, int]]:
    found = [entry for entry in listed(path) if isinstance(entry, TarMember)]
    return [(member.name, member.offset, member.size) for member in found]


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        return [(entry.name, entry.offset_data, entry.size) for entry in archive if entry.isreg()]


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form: int) -> None:
    rng = random.Random(form)
    long = f"{'d' * 90}/{'e' * 60}.jpg"
    longest = "" if form == tarfile.USTAR_FORMAT else f"{'f/' * 200}n\u00e4me.jpg"
    names = ["a.jpg", "b/c.png", long, *([longest] if longest else []), "z.cls"]
    members = {name: rng.randbytes(rng.choice([0, 1, 511, 512, 513, 9000])) for name in names}
    path = write_tar(tmp_path / "a.tar", members, form)
    found = regular(path)
    assert found == by_tarfile(path)
    assert [name for name, _, _ in found] == names
    descriptor, _ = open_regular(path)
    for name, offset, size in found:
        assert read_at(descriptor, offset, size) == members[name]
    os.close(descriptor)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program here")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_the_tar_program(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "set"
    (folder / "inner").mkdir(parents=True)
    for number in range(20):
        (folder / f"inner/{number:02d}.jpg").write_bytes(b"x" * number * 100)
    (folder / f"inner/{'n' * 60}.jpg").write_bytes(b"long")
    (folder / "link.jpg").symlink_to("inner/00.jpg")
    os.link(folder / "inner/05.jpg", folder / "inner/zz.jpg")
    path = tmp_path / "set.tar"
    words = ["tar", "--sort=name", "-cf", str(path), f"--format={form}", "-C", str(folder), "."]
    subprocess.run(words, check=True)
    assert regular(path) == by_tarfile(path)
    others = [entry.kind for entry in listed(path) if isinstance(entry, OtherMember)]
    assert others.count("link") == 2
    assert others.count("folder") == 2


def test_sizes_beyond_8_gib(tmp_path: Path) -> None:
    size = (1 << 33) + 7
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        header = tarfile.TarInfo("big.bin")
        header.size = size
        with path.open("wb") as file:
            file.write(header.tobuf(form))
            start = file.tell()
            file.truncate(start + size + (-size % 512))  # a hole: takes no space
            file.seek(0, os.SEEK_END)
            after = tarfile.TarInfo("after.jpg")
            after.size = 3
            file.write(after.tobuf() + b"abc".ljust(512, b"\0") + bytes(1024))
        assert regular(path) == [
            ("big.bin", start, size),
            ("after.jpg", start + size + (-size % 512) + 512, 3),
        ]


def test_our_own_headers_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    contents = {"000000001.jpg": b"x" * 700, "000000001.cls": b"3", "000000002.jpg": b""}
    path.write_bytes(
        b"".join(
            tar_header(name, len(content)) + content + tar_padding(len(content))
            for name, content in contents.items()
        )
        + bytes(1024)
    )
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
        assert [(entry.name, entry.mode, entry.mtime) for entry in entries] == [
            (name, 0o644, 0) for name in contents
        ]
        for entry in entries:
            content = archive.extractfile(entry)
            assert content is not None
            assert content.read() == contents[entry.name]
    assert regular(path) == by_tarfile(path)
    for name, size in (("n" * 101, 1), ("a", 1 << 33)):
        with pytest.raises(ValueError, match="does not fit"):
            tar_header(name, size)


def test_old_signed_checksums_are_accepted(tmp_path: Path) -> None:
    block = bytearray(tar_header("a.jpg", 0))
    block[300] = 200  # a byte that is negative where bytes have signs
    body = bytes(block[:148]) + b" " * 8 + bytes(block[156:])
    block[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in body)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + bytes(1024))
    assert regular(path) == [("a.jpg", 512, 0)]


@pytest.mark.parametrize("cut", range(1, 20))
def test_truncated_archives_are_refused(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" * 700 * n for n in range(4)})
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: len(content) * cut // 20])
    with pytest.raises(DataError, match=r"^a\.tar is (truncated after|damaged:)"):
        listed(path)


def test_an_end_mark_before_the_end_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": bytes([n]) * 700 for n in range(1, 30)})
    whole = path.read_bytes()
    assert len(regular(path)) == 29
    hole = tmp_path / "hole.tar"
    hole.write_bytes(whole[: 1536 * 9] + bytes(1536) + whole[1536 * 10 :])
    with pytest.raises(DataError, match="an end mark at byte 13,824, and more members behind it"):
        regular(hole)
    twice = tmp_path / "twice.tar"
    twice.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"an end mark at byte [\d,]+, and more members behind it"):
        regular(twice)
    lost = tmp_path / "lost.tar"
    lost.write_bytes(whole[: 1536 * 9] + bytes(2 << 20))
    with pytest.raises(DataError, match="an end mark at byte 13,824, and 2,097,152 bytes behind"):
        regular(lost)
    # As `tar --blocking-factor=2048` fills up.
    filled = tmp_path / "filled.tar"
    filled.write_bytes(whole.rstrip(b"\0") + bytes(1 << 19))
    assert len(regular(filled)) == 29


def test_random_damage_ends_in_a_data_error_or_in_members(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = write_tar(
        tmp_path / "a.tar",
        {f"{'p' * 120}/{n}.jpg": rng.randbytes(300) for n in range(6)},
        tarfile.PAX_FORMAT,
    ).read_bytes()
    path = tmp_path / "b.tar"
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            found = regular(path)
        except DataError:
            refused += 1
            continue
        assert all(0 <= at <= at + size <= len(content) for _, at, size in found)
    assert refused > 100


def _hostile(path: Path, kind: str) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "good.jpg", b"good")
        match kind:
            case "parent":
                add(archive, "../../x.jpg", b"bad")
            case "parent in PAX":
                add(archive, "x.jpg", b"bad", pax_headers={"path": "../../x.jpg"})
            case "absolute":
                add(archive, "/etc/x.jpg", b"bad")
            case "sparse in PAX":
                add(archive, "x.jpg", b"bad", pax_headers={"GNU.sparse.major": "1"})
            case "sparse":
                add(archive, "x.jpg", b"", type=b"S")
            case "zero byte in PAX":
                add(archive, "x.jpg", b"bad", pax_headers={"path": "x\0.jpg"})
            case "size in PAX":
                add(archive, "x.jpg", b"bad", pax_headers={"size": str(1 << 63)})
            case "negative size in PAX":
                add(archive, "x.jpg", b"bad", pax_headers={"size": "-1"})
            case _:
                raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("parent", r"member '\.\./\.\./x\.jpg' escapes the shard"),
        ("parent in PAX", r"member '\.\./\.\./x\.jpg' escapes the shard"),
        ("absolute", r"member '/etc/x\.jpg' escapes the shard"),
        ("sparse in PAX", r"member 'x\.jpg' is sparse"),
        ("sparse", r"member 'x\.jpg' is sparse"),
        ("zero byte in PAX", r"no usable name"),
        ("size in PAX", r"truncated after .*'x\.jpg' lacks 9,223,372,036,854,768,128 bytes"),
        ("negative size in PAX", r"a PAX header declares the size '-1'"),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "bad.tar"
    _hostile(path, kind)
    with pytest.raises(DataError, match=rf"^bad\.tar.*{message}"):
        listed(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tar"]


def test_an_absurd_size_in_a_plain_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    for size, message in ((1 << 63, "lacks"), (1 << 87, "lacks"), (-1, "declares no size")):
        block = bytearray(tar_header("x.jpg", 0))
        block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" * 12
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        path.write_bytes(bytes(block) + bytes(1024))
        with pytest.raises(DataError, match=rf"bad\.tar.*'x\.jpg' {message}"):
            listed(path)


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="not a regular file"):
        open_regular(tmp_path / "a.tar")
