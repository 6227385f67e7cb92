"""The manifest of a checkpoint: which files belong to it, and whether each is still the same."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path

from bigsimclr.errors import CheckpointError

SCHEMA = 1
FACTS = "facts.json"
MANIFEST = "manifest.json"

_MANIFEST_LIMIT = 1 << 20  # bytes; a manifest lists a handful of files
_CHUNK = 8 << 20  # bytes
_FILE_NAME = re.compile(r"facts\.json|[a-z][a-z0-9_]{0,63}(-[0-9]{5}-of-[0-9]{5})?\.safetensors")


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint, as the manifest lists it."""

    name: str
    size: int  # bytes
    sha256: str  # hexadecimal


class NewerSchemaError(CheckpointError):
    """The checkpoint is intact, and written by a later version of this package."""


def write_file(path: Path, content: bytes) -> StoredFile:
    """Write a new file and bring it to the disk, hashing it on the way.

    Args:
        path: the file; nothing exists there yet, not even a link.
        content: its bytes.
    """
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        whole = memoryview(content)
        for start in range(0, len(whole), _CHUNK):
            piece = whole[start : start + _CHUNK]
            digest.update(piece)
            while piece:
                piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return StoredFile(name=path.name, size=len(content), sha256=digest.hexdigest())


def manifest_json(examples: int, files: Sequence[StoredFile]) -> bytes:
    """Serialise a manifest; its own digest covers everything else in it.

    Args:
        examples: examples seen.
        files: all other files of the checkpoint.
    """
    body: dict[str, object] = {
        "schema": SCHEMA,
        "examples": examples,
        "files": [asdict(file) for file in files],
    }
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({**body, "sha256": digest})


def read_manifest(path: Path) -> tuple[int, list[StoredFile]]:
    """Check the manifest of a checkpoint against itself and against the directory.

    Args:
        path: the directory of the checkpoint.

    Returns:
        Examples seen, and the files it lists; their content is not read.

    Raises:
        CheckpointError: the manifest is damaged, or files are missing or extra.
        OSError: something cannot be read.
    """
    if path.is_symlink() or not path.is_dir():
        raise damage(path, "it is not a directory")
    with _open_regular(path / MANIFEST) as stream:
        content = stream.read(_MANIFEST_LIMIT)
    try:
        manifest: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damage(path, f"{MANIFEST} is not JSON") from error
    # Equality with the canonical form catches changes JSON itself would not notice.
    if not isinstance(manifest, dict) or canonical_json(manifest) != content:
        raise damage(path, f"{MANIFEST} has changed")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != hashlib.sha256(canonical_json(body)).hexdigest():
        raise damage(path, f"{MANIFEST} has changed (sha256 differs)")
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerSchemaError(
            f"checkpoint {path} was written by a later version (schema {schema}, this one reads "
            f"up to {SCHEMA}). Upgrade bigsimclr."
        )
    examples = manifest.get("examples")
    if schema != SCHEMA or not isinstance(examples, int) or path.name != f"{examples:012d}":
        raise damage(path, f"{MANIFEST} belongs to another checkpoint")
    files = _parse_files(path, manifest.get("files"))
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if wrong := found ^ {MANIFEST, *(file.name for file in files)}:
        raise damage(path, f"missing or unlisted files: {', '.join(sorted(wrong))}")
    return examples, files


def is_intact(path: Path) -> bool:
    """Verify every file of a checkpoint without holding its content.

    Args:
        path: the directory of the checkpoint; it need not exist.
    """
    try:
        _, files = read_manifest(path)
        for file in files:
            with _open_regular(path / file.name) as stream:
                _check_file(path, file, stream, hashlib.file_digest(stream, "sha256").hexdigest())
    except (OSError, CheckpointError):
        return False
    return True


def read_file(path: Path, file: StoredFile) -> bytes:
    """Read one file of a checkpoint and verify it.

    Args:
        path: the directory of the checkpoint.
        file: what the manifest says of it.

    Raises:
        CheckpointError: size or sha256 differ, or it is no regular file.
        OSError: it cannot be read.
    """
    with _open_regular(path / file.name) as stream:
        content = stream.read()
        _check_file(path, file, stream, hashlib.sha256(content).hexdigest())
    return content


def canonical_json(value: Mapping[str, object]) -> bytes:
    """Serialise JSON in the one form that equal values share.

    Args:
        value: JSON values; NaN and infinity are allowed, as Python writes them.
    """
    text = json.dumps(value, sort_keys=True, indent=1)
    return text.encode("ascii") + b"\n"


def damage(path: Path, reason: str) -> CheckpointError:
    """Word the error for a damaged checkpoint.

    Args:
        path: the directory of the checkpoint.
        reason: what is wrong with it.
    """
    return CheckpointError(f"checkpoint {path} is damaged ({reason})")


def _parse_files(path: Path, listed: object) -> list[StoredFile]:
    files: list[StoredFile] = []
    for entry in listed if isinstance(listed, list) else []:
        match entry:
            case {"name": str(name), "size": int(size), "sha256": str(sha256)} if (
                # Base names only: a manifest never reaches outside its directory.
                _FILE_NAME.fullmatch(name)
            ):
                files.append(StoredFile(name=name, size=size, sha256=sha256))
            case _:
                raise damage(path, f"{MANIFEST} lists something that is no checkpoint file")
    names = [file.name for file in files]
    if FACTS not in names or len(set(names)) != len(names):
        raise damage(path, f"{MANIFEST} does not list each file once")
    return files


def _check_file(path: Path, file: StoredFile, stream: BufferedReader, sha256: str) -> None:
    size = os.fstat(stream.fileno()).st_size
    if size != file.size:
        raise damage(path, f"{file.name} has {size} of {file.size} bytes")
    if sha256 != file.sha256:
        raise damage(path, f"{file.name} has changed (sha256 differs)")


def _open_regular(path: Path) -> BufferedReader:
    """Open a file that is no link, pipe or device; a pipe must not block either."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise damage(path.parent, f"{path.name} is not a regular file")
    return stream
