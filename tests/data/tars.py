"""Tar shards for tests, made by Python's own tarfile."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    """Append a member; `fields` are those of `TarInfo`."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write regular members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            add(archive, name, content)
    return path


def write_samples(
    path: Path, samples: Mapping[str, bytes], labels: Mapping[str, int] | None = None
) -> Path:
    """Write images by member name, each followed by the label of its key."""
    members: dict[str, bytes] = {}
    for name, content in samples.items():
        members[name] = content
        key = name.partition(".")[0]
        if labels is not None:
            members[f"{key}.cls"] = str(labels[key]).encode()
    return write_tar(path, members)


def as_json(**facts: object) -> bytes:
    """Encode a KEY.json member."""
    return json.dumps(facts).encode()
