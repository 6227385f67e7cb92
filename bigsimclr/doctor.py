"""What is here: software, devices, memory; and a proof that ranks compute what one process does.

Shapes: R images of this rank, 8 x 8 pixels.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

import bigsimclr
from bigsimclr.errors import DistributedError, RecipeError
from bigsimclr.launch.local import is_rank, run_ranks
from bigsimclr.losses import build_loss
from bigsimclr.models import Architecture, build_model
from bigsimclr.models.norm import share_batch_norm
from bigsimclr.recipe.sections import HeadSection, NtXentLoss, ResNetBackbone
from bigsimclr.world import World, join_world, use_device

EXTRAS: Final = {
    "parquet": ("pyarrow",),
    "tensorboard": ("tensorboard",),
    "remote": ("fsspec",),
    "webdataset": ("webdataset",),
    "slurm": ("submitit",),
    "deepspeed": ("deepspeed",),
    "dali": ("nvidia-dali-cuda130",),
    "dali-cuda12": ("nvidia-dali-cuda120",),
    "turbo": ("simplejpeg",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("lightly",),
}
"""What each extra of this package installs; an installation's own metadata may not be there."""
IMAGES_PER_RANK: Final = 4
SIDE: Final = 8  # pixels
TOLERANCE: Final = 1e-10
"""Largest difference that rounding explains, relative to the value; float64 has 2e-16."""


def describe(folder: Path) -> str:
    """Say what a run in `folder` would find here, one fact a line."""
    facts = [
        ("bigsimclr", bigsimclr.__version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", _torch()),
        *(("device", device) for device in _devices()),
        ("cpu", f"{_cores()} cores, {torch.get_num_threads()} threads of arithmetic"),
        *_rooms(folder),
        *_extras(),
        ("apex", _apex()),
    ]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts)


def _torch() -> str:
    if not torch.cuda.is_available():
        return torch.__version__
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    return f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {version}"


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu; no GPU that this PyTorch can use"]
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append(f"cuda:{number}, {name}, {_gib(free)} of {_gib(total)} GiB free")
    return found


def _cores() -> int:
    # A container or a scheduler may grant fewer than the machine has.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _rooms(folder: Path) -> list[tuple[str, str]]:
    rooms = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        free, total = sizes["MemAvailable:"], sizes["MemTotal:"]
        rooms.append(("memory", f"{_gib(free)} of {_gib(total)} GiB free"))
    shared = Path("/dev/shm")  # noqa: S108 - looked at, not written
    for name, path in (("shared memory", shared), ("disk", folder.absolute())):
        if path.exists():
            space = shutil.disk_usage(path)
            rooms.append((name, f"{_gib(space.free)} of {_gib(space.total)} GiB free, {path}"))
    return rooms


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _extras() -> list[tuple[str, str]]:
    found, missing = [], []
    for extra, names in EXTRAS.items():
        versions = [(name, _version(name)) for name in names]
        if any(version is None for _, version in versions):
            missing.append(extra)
        else:
            found.append(f"{extra} ({', '.join(f'{name} {v}' for name, v in versions)})")
    facts = [("extras", ", ".join(found) or "none")]
    if missing:
        command = f"pip install 'bigsimclr[{missing[0]}]'"
        facts.append(("not installed", f"{', '.join(missing)}; for instance: {command}"))
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _apex() -> str:
    spec = find_spec("apex")
    if spec is None:
        return "not installed, and not needed"
    # Nothing of it is imported: what calls itself apex on PyPI is a web framework.
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    has_optimizers = any((folder / "optimizers").is_dir() for folder in folders)
    if has_optimizers and find_spec("amp_C") is not None:
        return "NVIDIA's, with its kernels; not needed"
    if has_optimizers:
        return "NVIDIA's, without its kernels (no amp_C); not needed"
    return f"not NVIDIA's but PyPI's apex {_version('apex') or ''}; not needed: pip uninstall apex"


# --- ranks against one process -------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """Loss and gradient of a small network on the same images, however many processes share it."""

    loss: Tensor  # []
    gradients: tuple[Tensor, ...]  # of every parameter


def check_ranks(ranks: int, tell: Callable[[str], object]) -> int:
    """Compare loss and gradient of several ranks with those of one process, in float64.

    Ranks that somebody else started, as torchrun does, are compared as they are; else they are
    started on this machine. With a GPU for each rank, they are compared on the GPUs as well.

    Args:
        ranks: how many to start.
        tell: receives a line for each comparison.

    Returns:
        The exit code.

    Raises:
        DistributedError: they differ, or a rank was lost.
    """
    if not is_rank():
        return run_ranks(ranks, ["doctor", "--dist", str(ranks)])
    with join_world() as world:
        worlds = [world]
        on_gpus = _on_gpus(world)
        if on_gpus is not None:
            worlds.append(on_gpus)
        elif world.rank == 0 and torch.cuda.is_available():
            tell("GPUs are not compared: not every rank has one of its own")
        for where in worlds:
            shared = _averaged(compute(where, world.size), where)
            if world.rank == 0:
                alone = compute(World(0, 1, where.device), world.size)
                tell(compare(shared, alone, where))
    return 0


def _on_gpus(world: World) -> World | None:
    """Return this rank on its GPU; None on all ranks where one of them has none."""
    try:
        found = use_device(world, "cuda")
    except RecipeError:
        found = None
    having = world.total(torch.tensor(float(found is not None)))
    return found if having.item() == world.size else None


def compute(world: World, ranks: int) -> Computed:
    """Compute this rank's share: NT-Xent through a network with batch norm over all ranks.

    Args:
        world: this process.
        ranks: by whose number the images are counted.
    """
    head = HeadSection(layers=2, output_width=16)
    backbone = ResNetBackbone(depth=10, width=1 / 16, stem="cifar")
    model = build_model(Architecture(backbone, head, None, 0), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Scales that begin at zero would keep gradients from whole blocks.
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.to(world.device, torch.float64)
    share_batch_norm(model, world)
    images = IMAGES_PER_RANK * ranks
    views = torch.rand(2, images, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    own = views.chunk(world.size, dim=1)[world.rank].to(world.device)  # [2, R, 3, 8, 8]
    first, second = model(own.flatten(0, 1)).projections[-1].chunk(2)
    loss = build_loss(NtXentLoss(temperature=0.5), world)(first, second)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return Computed(loss.detach(), gradients)


def _averaged(own: Computed, world: World) -> Computed:
    """Average over ranks, as training does."""
    gradients = tuple(world.total(gradient) / world.size for gradient in own.gradients)
    return Computed(world.total(own.loss) / world.size, gradients)


def compare(shared: Computed, alone: Computed, world: World) -> str:
    """Say in a line how far ranks and one process agree.

    Args:
        shared: of all ranks.
        alone: of one process.
        world: how the ranks spoke to each other.

    Raises:
        DistributedError: they differ by more than rounding.
    """
    pairs = list(zip(shared.gradients, alone.gradients, strict=True))
    largest = max(float(one.abs().max()) for one in alone.gradients)
    difference = max(float((ours - one).abs().max()) for ours, one in pairs) / largest
    off = float((shared.loss - alone.loss).abs() / alone.loss.abs())
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    line = (
        f"dist  {backend} x{world.size}: loss {float(shared.loss):.10g} = "
        f"{float(alone.loss):.10g} (1 process), largest gradient difference {difference:.0e}"
    )
    # Written so that a value that is no number fails.
    if not (off <= TOLERANCE and difference <= TOLERANCE):
        raise DistributedError(
            f"{line.replace(' = ', ' and ')}: ranks do not compute what one process does; "
            "do not train on several ranks here before this is found"
        )
    return f"{line}  ok"
