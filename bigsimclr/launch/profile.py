"""Cluster profiles: what a job asks of Slurm, as frozen data; nothing of the science is in them.

Every text that gets into a batch script is checked against a list of allowed characters: sbatch
reads quotes in its own way, and a line break would start a command on the cluster.
"""

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, NonNegativeInt, PositiveInt, model_validator

from bigsimclr.errors import RecipeError
from bigsimclr.recipe.keys import nearest
from bigsimclr.recipe.loader import Overrides, load_section
from bigsimclr.recipe.names import is_file
from bigsimclr.recipe.sections import Section, UserPath
from bigsimclr.recipe.yaml_tree import show

# None begins with a dash: a program would take it for an option.
_WORD: Final = re.compile(r"(?!-)[A-Za-z0-9._+=:@,/-]{1,128}")
_NODES: Final = re.compile(r"(?!-)[A-Za-z0-9._+=:@,/&|*()\[\]-]{1,256}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_TIME: Final = re.compile(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d):([0-5]\d)")
_LEAST_WARNING: Final = 10  # seconds

GpuName = Literal["a100", "h100", "h200"]


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError(
            f"'{show(text)}' is refused; use letters, digits and . _ + = : @ , / - (not in front), "
            "128 at most"
        )
    return text


def _nodes(text: str) -> str:
    if not _NODES.fullmatch(text):
        raise ValueError(
            f"'{show(text)}' is refused; use letters, digits and . _ + = : @ , / & | * ( ) [ ] - "
            "(not in front), 256 at most"
        )
    return text


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"'{show(text)}' is empty, or holds control characters")
    return text


def _program(text: str) -> str:
    if text.startswith("-") or Path(text).name in ("", ".."):
        raise ValueError(f"'{show(text)}' is no program; give its name or path")
    return text


def _time(text: str) -> str:
    if not _TIME.fullmatch(text) or time_seconds(text) < 60:
        raise ValueError(
            f"'{show(text)}' is no time; write HH:MM:SS or D-HH:MM:SS, a minute or more"
        )
    return text


def _environment(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"'{show(name)}' is no name of an environment variable")
        strange = next((sign for sign in value if not sign.isprintable() and sign != "\n"), None)
        if strange is not None:  # the copy that the job reads could not hold it
            raise ValueError(f"{name}: holds the control character U+{ord(strange):04X}")
    return variables


def _lead(seconds: int) -> int:
    if seconds < _LEAST_WARNING:
        raise ValueError(f"{seconds} s are too few; use {_LEAST_WARNING} or more")
    return seconds


Word = Annotated[str, AfterValidator(_word)]
NodeList = Annotated[str, AfterValidator(_nodes)]
Printable = Annotated[str, AfterValidator(_printable)]
Time = Annotated[str, AfterValidator(_time)]
Lead = Annotated[int, AfterValidator(_lead)]
Program = Annotated[Printable, AfterValidator(_program)]
Interpreter = Annotated[UserPath, AfterValidator(lambda path: Path(_program(_word(str(path)))))]
Variables = Annotated[dict[str, str], AfterValidator(_environment)]


def time_seconds(text: str) -> int:
    """Return what D-HH:MM:SS means."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text} is no time")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class ContainerSection(Section):
    """A container for the ranks, started by srun with the pyxis plugin."""

    image: Printable
    """Image, as `srun --container-image` takes it."""
    mounts: tuple[Printable, ...] = ()
    """Folders of the node inside the container, as `OUTSIDE:INSIDE`."""
    python: Program = "python3"
    """Python with this package inside the container."""


class Profile(Section):
    """What a job asks of Slurm, and how its ranks are started."""

    nodes: PositiveInt = 1
    """Nodes of a job."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a node; 0: the ranks compute on CPUs."""
    gpu_type: Word | None = None
    """Slurm's name of the GPUs, where it wants one (`--gpus-per-node=h100:8`)."""
    gpu: GpuName | None = None
    """What the GPUs are, for the plan's hours and memory; null: no estimate."""
    ranks_per_node: PositiveInt | None = None
    """Ranks of a node; null: one for each GPU, or one without GPUs."""
    cpus_per_rank: PositiveInt = 1
    """CPUs of a rank: itself, and its processes that read images."""
    memory_gb: PositiveInt | None = None
    """Memory of a node in GB; null: what the partition gives."""
    exclusive: bool = False
    """Whether nobody else gets CPUs of the nodes."""
    time: Time
    """Longest time of one allocation, HH:MM:SS or D-HH:MM:SS; a run may take many."""
    partition: Word | None = None
    """Partition; null: the cluster's default."""
    account: Word | None = None
    """Account that pays."""
    qos: Word | None = None
    """Quality of service."""
    reservation: Word | None = None
    """Reservation to run in."""
    constraint: NodeList | None = None
    """Features that nodes must have."""
    exclude: NodeList | None = None
    """Nodes to leave out."""
    comment: Word | None = None
    """Comment that the accounting keeps."""
    signal_seconds: Lead = 120
    """Seconds before the time limit at which the run is asked to save: more than an update and a
    checkpoint take. Slurm may be a minute early."""
    requeue: bool = True
    """Whether the job goes back into the queue when its time is up, after a failure of a node or
    rank, and when it is preempted."""
    restarts_without_progress: NonNegativeInt = 3
    """Restarts in a row that may bring no new checkpoint; then the job is not started again."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """Who starts the ranks of a node: Slurm itself, one task for each; or torchrun in one task."""
    cpu_binding: Literal["none", "cores", "sockets", "ldoms"] = "cores"
    """What `srun --cpu-bind` ties each task to; with torchrun a task is a whole node."""
    modules: tuple[Word, ...] = ()
    """Environment modules to load first."""
    python: Interpreter | None = None
    """Python with this package on the nodes, outside of a container; null: the one that submits."""
    container: ContainerSection | None = None
    """Container for the ranks; null: none."""
    environment: Variables = {}  # noqa: RUF012 - pydantic copies it
    """Variables for the ranks, such as `NCCL_DEBUG: WARN`."""

    @model_validator(mode="after")
    def _fits(self) -> "Profile":
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node: {self.ranks} ranks share {self.gpus_per_node} GPUs; a rank needs "
                "one of its own"
            )
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError("gpu_type: there are no GPUs; set gpus_per_node")
        if self.signal_seconds >= time_seconds(self.time):
            raise ValueError(
                f"signal_seconds: {self.signal_seconds} s before a limit of {self.time} would be "
                "at once; give more time"
            )
        return self

    @property
    def ranks(self) -> int:
        """Count the ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Count the ranks of a job."""
        return self.nodes * self.ranks


def profiles_folder() -> Path:
    """Return the folder of the profiles that ship: in the wheel, else beside the package."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "slurm"
    return inside if inside.is_dir() else package.parent / "slurm"


def find_profile(name: str | Path) -> Path:
    """Find the file of a profile.

    Args:
        name: a file, or the name of one that ships, with or without `slurm/` and `.yaml`.

    Raises:
        RecipeError: there is no such file and no such name.
    """
    if is_file(Path(name)):
        return Path(name)
    shipped = {file.stem: file for file in sorted(profiles_folder().glob("*.yaml"))}
    plain = str(name).removesuffix(".yaml").removeprefix("slurm/")
    if plain in shipped:
        return shipped[plain]
    near = nearest(plain, shipped)
    hint = f"did you mean '{near}'?" if near else f"those that ship: {', '.join(shipped)}"
    raise RecipeError(f"{show(str(name), 200)}: no such file and no profile of that name; {hint}")


def load_profile(name: str | Path, overrides: Overrides = ()) -> Profile:
    """Read a profile.

    Args:
        name: as for `find_profile`.
        overrides: keys to replace or add, as for a recipe.

    Raises:
        RecipeError: it cannot be used; one line per mistake, each with file and line.
    """
    return load_section(find_profile(name), Profile, overrides)
