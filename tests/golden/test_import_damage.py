"""Damaged official checkpoints: the weights of before, or one error."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from bigsimclr.errors import CheckpointError
from bigsimclr.interop.tf_checkpoint import find_checkpoint, import_checkpoint
from tests.golden.checkpoints import checkpoints
from tests.golden.forward import CASES
from tests.interop.official import same_bits

# Each mutation is an import: half a minute in all.
pytestmark = [pytest.mark.golden, pytest.mark.slow]

MUTATIONS = 200


def mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    at = chance.randrange(len(content))
    match chance.randrange(7):
        case 0 | 1:
            changed[at] ^= 1 << chance.randrange(8)
        case 2:
            del changed[at:]
        case 3:
            del changed[-chance.randrange(1, 60) :]
        case 4:
            changed += chance.randbytes(chance.randrange(1, 60))
        case 5:
            changed[at:at] = chance.randbytes(chance.randrange(1, 12))
        case _:
            del changed[at : at + chance.randrange(1, 12)]
    return bytes(changed)


def state(path: Path) -> dict[str, Tensor]:
    return import_checkpoint(path).portable.model.state_dict()


def smallest(form: str, scratch: Path) -> Path:
    """The folder of the smallest checkpoint of a form."""

    def found() -> Iterator[Path]:
        for case in CASES:
            folder = checkpoints(case, scratch / case.name).get(form)
            if folder is not None:
                yield folder

    folders = sorted(found(), key=lambda f: sum(file.stat().st_size for file in f.iterdir()))
    if not folders:
        pytest.skip(f"no case has a {form} checkpoint")
    return folders[0]


@pytest.mark.parametrize("form", ["tf1", "tf2"])
def test_chance_damage_is_found_or_harmless(tmp_path: Path, form: str) -> None:
    prefix = find_checkpoint(smallest(form, tmp_path))
    expected, chance = state(prefix), random.Random(form)
    files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
    contents = {file.name: file.read_bytes() for file in files}
    errors = 0
    for number in range(MUTATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(file)
        victim = folder / files[number % len(files)].name
        victim.unlink()
        victim.write_bytes(mutated(contents[victim.name], chance))
        try:
            found = state(folder)
        except CheckpointError:
            errors += 1
        else:
            assert same_bits(found, expected), number
        victim.unlink()
    # The rest fell on momenta, on padding, or behind the end.
    assert errors > MUTATIONS / 2
