"""Cluster profiles: those that ship, mistakes in them, times, and texts that would be commands."""

import shlex
import subprocess
from functools import partial
from pathlib import Path

import pytest

from bigsimclr.errors import RecipeError
from bigsimclr.launch.batch import Allocation, srun_words
from bigsimclr.launch.profile import (
    Profile,
    find_profile,
    load_profile,
    profiles_folder,
    time_seconds,
)
from bigsimclr.launch.slurm import script
from bigsimclr.launch.submission import Element, Job
from tests.architecture.tree import ROOT
from tests.launch.cluster import HOSTILE, PROFILE, outcome

SHIPPED = {  # nodes, ranks, CPUs of a rank, GPU, seconds
    "container": (2, 16, 16, "a100", 43_200),
    "cpu": (2, 2, 2, None, 3_600),
    "h100_x32": (4, 32, 12, "h100", 86_400),
    "h100_x64": (8, 64, 12, "h100", 86_400),
    "h100_x8": (1, 8, 12, "h100", 86_400),
}
PYTHON = "/usr/python"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    return path


def script_of(profile: Profile, folder: Path) -> list[str]:
    if profile.python is None:
        profile = profile.model_copy(update={"python": Path(PYTHON)})
    run = folder / "run"
    job = Job("", "name", run / "slurm", (Element(run, (), None),), ())
    return script(job, profile, dependencies=()).splitlines()


def sbatch_words(lines: list[str]) -> dict[str, str]:
    """Read a script's options back as a shell would split them."""
    found = {}
    for line in lines:
        if line.startswith("#SBATCH"):
            _, option = shlex.split(line)
            key, _, value = option.partition("=")
            found[key.removeprefix("--")] = value
    return found


# --- those that ship ------------------------------------------------------------------------------


def test_these_profiles_ship() -> None:
    assert profiles_folder() == ROOT / "slurm"
    assert sorted(path.stem for path in profiles_folder().glob("*.yaml")) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_profile_loads_by_every_name(name: str) -> None:
    nodes, ranks, cpus, gpu, seconds = SHIPPED[name]
    profile = load_profile(f"slurm/{name}.yaml")
    assert load_profile(name) == load_profile(f"slurm/{name}") == profile
    assert load_profile(ROOT / "slurm" / f"{name}.yaml") == profile
    assert (profile.nodes, profile.world_size, profile.cpus_per_rank) == (nodes, ranks, cpus)
    assert (profile.gpu, time_seconds(profile.time)) == (gpu, seconds)
    assert profile.requeue
    assert profile.launcher == ("torchrun" if name == "container" else "srun")


@pytest.mark.parametrize("name", SHIPPED)
def test_profile_says_what_it_is_and_how_to_use_it(name: str) -> None:
    first, second, *_ = find_profile(name).read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")
    assert second.startswith("# Command:  bigsimclr submit ")
    assert second.endswith(f" --on slurm/{name}.yaml")


def test_commented_keys_of_shipped_profiles_are_keys(tmp_path: Path) -> None:
    for name in SHIPPED:
        lines = find_profile(name).read_text(encoding="utf-8").splitlines()
        for line in lines[2:]:
            text = line.strip()
            key = text.removeprefix("# ").partition(":")[0]
            if text.startswith("# ") and key.isidentifier() and key.islower():
                assert key in Profile.model_fields, f"{name}: {line}"
        # Uncommented, they load as well.
        plain = "\n".join(
            line.replace("# ", "", 1) if line.startswith("# ") and ": " in line else line
            for line in lines[2:]
            if not line.startswith("# The")
        )
        (tmp_path / f"{name}.yaml").write_text(plain)
        assert load_profile(tmp_path / f"{name}.yaml").world_size == SHIPPED[name][1]


def test_the_script_for_sbatch_users_is_sound_and_asks_what_submit_asks(tmp_path: Path) -> None:
    path = ROOT / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    options = {
        line.split()[1].partition("=")[0].removeprefix("--")
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    }
    asked = sbatch_words(script_of(load_profile("h100_x8"), tmp_path)).keys()
    assert asked - {"exclusive", "kill-on-invalid-dep"} == options
    assert "exec bigsimclr srun imagenet/1_pretrain" in text


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("time: 01:00:00\nnodez: 2\n", 2, "nodez: unknown key; did you mean 'nodes'?"),
        ("nodes: 2\n", 1, "time: the required key is missing"),
        ("time: 01:00:00\nnodes: 0\n", 2, "nodes: should be greater than 0, not 0"),
        ("time: 01:00:00\n\nnodes: two\n", 3, "nodes: "),
        ("time: 1 hour\n", 1, "time: '1 hour' is no time; write HH:MM:SS or D-HH:MM:SS"),
        ("time: 00:00:59\n", 1, "time: '00:00:59' is no time"),
        ("time: 01:00:00\nsignal_seconds: 9\n", 2, "signal_seconds: 9 s are too few; use 10"),
        ("time: 01:00:00\nlauncher: mpirun\n", 2, "launcher: "),
        ("time: 01:00:00\ncpu_binding: all\n", 2, "cpu_binding: "),
        ("time: 01:00:00\ngpu: v100\n", 2, "gpu: "),
        ("time: 01:00:00\ncontainer: {mounts: []}\n", 2, "container.image: "),
        ("time: 01:00:00\ncontainer: {image: ''}\n", 2, "container.image: '' is empty"),
        ("time: 01:00:00\npartition: a b\n", 2, "partition: 'a b' is refused; use letters, dig"),
        ("time: 01:00:00\nexclude: n[1-2];x\n", 2, "exclude: 'n[1-2];x' is refused; use lett"),
        ("time: 01:00:00\nmodules: [cuda, 'a;b']\n", 2, "modules.1: 'a;b' is refused"),
        ("time: 01:00:00\nenvironment: {A-B: x}\n", 2, "environment: 'A-B' is no name of an env"),
        ("time: 01:00:00\nenvironment: {A: 1}\n", 2, "environment.A: "),
        ("time: 01:00:00\nmemory_gb: 1.5\n", 2, "memory_gb: "),
        ("time: 01:00:00\nrequeue: 'yes'\n", 2, "requeue: "),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}:{line}: {message}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gpus_per_node": 4, "ranks_per_node": 8}, "ranks_per_node: 8 ranks share 4 GPUs"),
        ({"gpu_type": "h100"}, "gpu_type: there are no GPUs; set gpus_per_node"),
        ({"signal_seconds": 7200}, "signal_seconds: 7200 s before a limit of 02:00:00 would be"),
    ],
)
def test_keys_that_do_not_fit_each_other(file: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_profile(file, keys)
    assert str(caught.value).startswith(f"{file}:")
    assert message in str(caught.value)


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("time: x\nnodes: 0\nfoo: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_profile(path, ["qos=a b"])
    lines = str(caught.value).splitlines()
    assert lines[-1] == "4 errors, nothing was started."
    assert lines[0].startswith("override qos: 'a b' is refused")
    assert lines[1].startswith(f"{path}:1: time: 'x' is no time")
    assert lines[2].startswith(f"{path}:2: nodes: should be greater than 0")
    assert lines[3].startswith(f"{path}:3: foo: unknown key")


def test_an_unknown_profile(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"h100_x46: no such file .* did you mean 'h100_x64'"):
        load_profile("slurm/h100_x46")
    listed = ", ".join(SHIPPED)
    with pytest.raises(RecipeError, match=f"zzzzzz: .*; those that ship: {listed}$"):
        load_profile("zzzzzz")


def test_hostile_names_of_profiles_are_one_line(tmp_path: Path) -> None:
    for text in HOSTILE:
        with pytest.raises(RecipeError) as caught:
            load_profile(tmp_path / f"a{text}b")
        assert str(caught.value).isprintable(), text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:01:00", 60),
        ("1:00:00", 3_600),
        ("01:02:03", 3_723),
        ("24:00:00", 86_400),
        ("100:00:00", 360_000),
        ("1-02:03:04", 93_784),
        ("30-00:00:00", 2_592_000),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds
    assert load_profile("cpu", [f"time={text}", "signal_seconds=10"]).time == text


@pytest.mark.parametrize(
    "text",
    ["60", "1:00", "1:60:00", "1:00:60", "1-1", "-1:00:00", "1-00:00", "1:00:00 ", "UNLIMITED"],
)
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        time_seconds(text)
    with pytest.raises(RecipeError, match="time"):
        load_profile("cpu", {"time": text})


def test_ranks_of_a_node() -> None:
    def ranks(**keys: int) -> tuple[int, int]:
        profile = Profile(time="01:00:00", **keys)
        return profile.ranks, profile.world_size

    assert ranks(nodes=2) == (1, 2)
    assert ranks(nodes=2, gpus_per_node=8) == (8, 16)
    assert ranks(nodes=2, gpus_per_node=8, ranks_per_node=4) == (4, 8)
    assert ranks(nodes=3, ranks_per_node=6) == (6, 18)


# --- texts that would like to be commands ---------------------------------------------------------

IN_SCRIPT = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "reservation": "reservation",
    "comment": "comment",
    "constraint": "constraint",
    "exclude": "exclude",
}


def test_there_are_many_hostile_texts() -> None:
    assert len(HOSTILE) >= 100
    assert len(set(HOSTILE)) == len(HOSTILE)


def loaded_or_refused(file: Path, key: str, value: object) -> Profile | None:
    """Load a profile with one key; a refusal must be one line that names the key."""
    profile, refused = outcome(lambda: load_profile(file, {key: value}))
    assert profile is not None or refused.startswith(f"override {key}"), refused
    return profile


@pytest.mark.parametrize("key", IN_SCRIPT)
def test_a_text_of_the_script_is_refused_or_stands_there_as_it_is(
    file: Path, tmp_path: Path, key: str
) -> None:
    usual = script_of(load_profile(file, {key: "plain"}), tmp_path)
    accepted = []
    for text in HOSTILE:
        profile = loaded_or_refused(file, key, text)
        if profile is None:
            continue
        accepted.append(text)
        made = script_of(profile, tmp_path)
        (changed,) = {line for line in made if line not in usual}
        assert len(made) == len(usual)
        assert shlex.split(changed) == ["#SBATCH", f"--{IN_SCRIPT[key]}={text}"]
    assert {"..", "1e3", "null", "a,b", "a=b", "a:b", "a@b"} <= set(accepted)
    refused = set(HOSTILE) - set(accepted)
    assert {"", "-x", "a'b", "a$(touch canary)b", "a b", "a%jb", "a\u00e9b"} <= refused
    assert not any(set(text) & set("'\"`$;\n\\%#~{} \0") for text in accepted)


def test_a_type_of_gpu(file: Path, tmp_path: Path) -> None:
    file.write_text(f"{PROFILE}gpus_per_node: 8\n")
    for text in HOSTILE:
        profile = loaded_or_refused(file, "gpu_type", text)
        if profile is not None:
            assert sbatch_words(script_of(profile, tmp_path))["gpus-per-node"] == f"{text}:8"


def test_modules(file: Path, tmp_path: Path) -> None:
    usual = script_of(load_profile(file, {"modules": ["cuda"]}), tmp_path)
    assert usual[usual.index("# setup") + 1] == "module load cuda"
    for text in HOSTILE:
        profile = loaded_or_refused(file, "modules", ["cuda", text])
        if profile is not None:
            made = script_of(profile, tmp_path)
            assert made[made.index("# setup") + 2] == f"module load {text}"
            assert shlex.split(f"module load {text}") == ["module", "load", text]
            assert len(made) == len(usual) + 1


def test_the_python_of_the_nodes(file: Path, tmp_path: Path) -> None:
    usual = script_of(load_profile(file, {"python": "/usr/x"}), tmp_path)
    rest = ["-u", "-m", "submitit.core._submit", str(tmp_path / "run" / "slurm")]
    for text in HOSTILE:
        profile = loaded_or_refused(file, "python", text)
        if profile is not None:
            made = script_of(profile, tmp_path)
            assert len(made) == len(usual)
            assert shlex.split(made[-1]) == ["exec", str(profile.python), *rest]
            assert not str(profile.python).startswith("-")
    home = load_profile(file, {"python": "~/venv/bin/python"}).python
    assert home == Path.home() / "venv/bin/python"


@pytest.mark.parametrize("text", ["", ".", "..", "/", "a/.."])
def test_what_is_no_program(file: Path, text: str) -> None:
    assert loaded_or_refused(file, "python", text) is None


def test_texts_of_a_container_are_single_words_of_srun(file: Path, tmp_path: Path) -> None:
    given = Allocation("1", "1", 0, ("n1",), 1, "1", 0)
    usual = script_of(load_profile(file), tmp_path)
    for text in HOSTILE:
        for key, value in (("image", text), ("mounts", [text]), ("python", text)):
            container = {"image": "images/a.sqsh", key: value}
            profile, refused = outcome(partial(load_profile, file, {"container": container}))
            if profile is None:
                assert refused.startswith("override container: "), refused
                continue
            assert profile.container is not None
            words = srun_words(given, profile)
            assert text.isprintable()
            if key == "python":
                # It stands as a word of its own, where srun would take options.
                assert profile.container.python == text
                assert not text.startswith("-")
            else:
                option = {"image": "--container-image", "mounts": "--container-mounts"}[key]
                assert f"{option}={text}" in words
            assert script_of(profile, tmp_path) == usual


def test_variables_reach_the_ranks_as_they_are(file: Path, tmp_path: Path) -> None:
    usual = script_of(load_profile(file), tmp_path)
    copy = tmp_path / "profile.json"
    for text in HOSTILE:
        profile = loaded_or_refused(file, "environment", {"NCCL_DEBUG": text})
        if profile is not None:
            assert profile.environment == {"NCCL_DEBUG": text}
            assert script_of(profile, tmp_path) == usual
            copy.write_text(profile.model_dump_json(indent=1), encoding="utf-8")
            assert load_profile(copy) == profile  # what the job reads
        name = loaded_or_refused(file, "environment", {text: "x"})
        if name is not None:
            assert text.isidentifier()
            assert text.isascii()
            assert len(text) <= 128
    assert load_profile(file, {"environment": {"A": "x\ny 'z' $(a)"}}).environment["A"]


def test_texts_written_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in HOSTILE:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        path.write_text(f'{PROFILE}partition: "{quoted}"\n', encoding="utf-8", newline="")
        profile, refused = outcome(lambda: load_profile(path))
        if profile is None:
            assert refused.startswith(f"{path}:2: "), refused
        else:
            assert profile.partition == text
