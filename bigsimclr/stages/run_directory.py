"""The directory of one run: what is written there, and whether it may be continued."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bigsimclr
from bigsimclr.data.subsets import write_list
from bigsimclr.engine.liveness import Pulse
from bigsimclr.errors import CheckpointError, DataError, RecipeError
from bigsimclr.recipe import save_recipe
from bigsimclr.recipe.schema import AnyStage
from bigsimclr.storage import publish

# Keys that change nothing about what is trained, so a run may continue with other values.
FREE_SECTIONS = ("log", "checkpoint")
# Images, labels and parents are compared by what they are, wherever they lie.
FREE_KEYS = (
    "parallel.strategy",
    "parallel.offload",
    "parallel.reshard",
    "parallel.memory",
    "parallel.kernels",
    "parallel.cuda_graph",
    "parallel.hang_seconds",
    "parallel.cpu_threads",
    "input.workers",
    "input.prefetch_batches",
    "input.decoder",
    "input.unreadable_limit",
    "data.root",
    "data.manifest",
    "data.remote",
    "labels.list",
    "parent",
)
LAUNCHER_FOLDER = "slurm"
"""Where the launcher keeps a job's files, also before a run or a pipeline begins."""
# The keys of one source of a mixture are those of a source that stands alone.
_SOURCE_NUMBER = re.compile(r"^data\.sources\.\d+\.data\.")
OWN_FILES = (
    "recipe.yaml",
    "plan.json",
    "environment.json",
    "metrics.jsonl",
    "attempts.jsonl",
    "checkpoints",
    "images.json.gz",
    "labels.txt",
    "unreadable.txt",
    "tensorboard",
    "stacks",
    LAUNCHER_FOLDER,
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """Return the file whose presence says that the run is finished."""
        return self.path / "result.json"

    def check_free(self) -> None:
        """Refuse a directory that holds anything but this or a new run.

        Raises:
            RecipeError: it holds a pipeline, or files of somebody else.
        """
        if (self.path / "pipeline.json").exists():
            raise RecipeError(f"{self.path} holds a pipeline; choose another --out")
        if not (self.path / "recipe.yaml").exists():
            refuse_strangers(self.path, OWN_FILES)

    def note_unreadable(self, found: Mapping[str, str]) -> None:
        """Add unreadable images and the reasons to `unreadable.txt`."""
        known = self.unreadable()
        if found.keys() - known.keys():
            lines = [f"{name}\t{why}\n" for name, why in sorted({**known, **found}.items())]
            publish(self.path / "unreadable.txt", "".join(lines))

    def unreadable(self) -> dict[str, str]:
        """Return the images that could not be read so far, with the reasons."""
        path = self.path / "unreadable.txt"
        if not path.exists():
            return {}
        pairs = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
        return {name: why for name, _, why in pairs}

    def describe(
        self, recipe: AnyStage, plan: Mapping[str, object], *, labels: Sequence[str] | None
    ) -> None:
        """Write the resolved recipe, the plan, the environment and the labelled images' names."""
        if labels is not None:
            write_list(self.path / "labels.txt", labels)
        save_recipe(recipe, self.path / "recipe.yaml")
        write_json(self.path / "plan.json", plan)
        write_json(self.path / "environment.json", environment())


@dataclass(frozen=True)
class ActiveRun:
    """A run in progress: this process holds its directory, or is one of the ranks that do."""

    directory: RunDirectory
    fence: Callable[[], None]  # raises StorageError when somebody else has taken it over
    pulse: Pulse


def refuse_strangers(directory: Path, own: Collection[str]) -> None:
    """Refuse to write among files that are not this run's.

    Raises:
        RecipeError: the directory is a file, or holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory} is a file, not a directory; choose another --out")
    if not directory.exists():
        return
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    strange = [name for name in names if name not in own]
    if strange:
        raise RecipeError(
            f"{directory} is not a run directory: it holds {strange[0]}"
            f"{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}; choose another --out"
        )


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is either whole or absent.

    Raises:
        StorageError: it cannot be written.
    """
    publish(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def add_command(directory: Path, command: str) -> None:
    """Record the command line that repeats a run, beside its environment."""
    path = directory / "environment.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**known, "command": command})


def environment() -> dict[str, object]:
    """Describe the software and the machine, for the report and for reproduction."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "bigsimclr": bigsimclr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "commit": source_commit(),
    }


def source_commit(tree: Path = Path(bigsimclr.__file__).parent.parent) -> str | None:
    """Return the git commit of a source tree, by default of this package's.

    Returns:
        What a file `.commit` there says, as in a tree that was copied without all of its history;
        else what git says; None for an installed package.
    """
    note = tree / ".commit"
    if note.is_file() and (noted := note.read_text(encoding="utf-8").strip()):
        return noted
    git = shutil.which("git")
    if git is None or not (tree / ".git").exists():
        return None
    answer = subprocess.run(  # noqa: S603 - a fixed command without user input
        [git, "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def recipe_facts(recipe: AnyStage) -> dict[str, object]:
    """Return the recipe as plain JSON values."""
    facts = json.loads(recipe.model_dump_json())
    if not isinstance(facts, dict):
        raise AssertionError("a recipe is a mapping")
    return facts


def with_absolute_paths(recipe: AnyStage) -> AnyStage:
    """Return the same recipe with absolute paths, so that it means the same in any directory."""
    facts = recipe_facts(recipe)
    data = facts.get("data")
    mixed = data.get("sources", []) if isinstance(data, dict) else []
    sources = [data, *(source["data"] for source in mixed)]
    for section, key in (
        (facts, "parent"),
        *((source, key) for source in sources for key in ("root", "manifest")),
        (facts.get("labels"), "list"),
    ):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = str(Path(section[key]).absolute())
    return type(recipe).model_validate_json(json.dumps(facts))


def check_same_recipe(recipe: AnyStage, stored: object, directory: Path) -> None:
    """Refuse to continue a run under a recipe that would train something else.

    Raises:
        RecipeError: a key that matters differs; the message names each with both values.
    """
    now, before = flatten(recipe_facts(recipe)), flatten(stored)
    changed = [
        f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
        and key.split(".")[0] not in FREE_SECTIONS
        and _SOURCE_NUMBER.sub("data.", key) not in FREE_KEYS
    ]
    if changed:
        raise RecipeError(
            f"{directory}: the recipe differs from the run in {', '.join(changed)}; "
            "use the run's own values, or another --out for a new run"
        )


def check_same_origins(
    now: Mapping[str, str | None],
    stored: object,
    directory: Path,
    *,
    explain: Callable[[], str] = str,
) -> None:
    """Refuse to continue a run on other images, labels, or another parent.

    Args:
        now: fingerprints, by what they are of.
        stored: the same when the run began.
        directory: the run directory.
        explain: says how they differ, "" where it is not known.

    Raises:
        DataError: a fingerprint differs; the message names what.
    """
    before = stored if isinstance(stored, dict) else {}
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        how = explain()
        raise DataError(
            f"{directory}: changed since the run began: {', '.join(changed)}"
            f"{f' ({how})' if how else ''}; "
            "restore what was, or use another --out for a new run"
        )


def read_result(directory: Path) -> dict[str, object]:
    """Read the result of a finished run.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = directory / "result.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        raise CheckpointError(f"{path} is damaged; remove it to run the stage's end again")
    return found


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Turn nested mappings, and lists of them, into dotted keys."""
    if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    pairs: dict[str, object] = {}
    for key, inner in value.items():
        pairs |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return pairs
