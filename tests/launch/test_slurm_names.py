"""Hostile names in every text that a job is made of: nothing of them is ever run as a command."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.slurm_lab import Lab, lab, missing
from bigsimclr.cli import app
from bigsimclr.launch.jobs import jobs_of
from tests.launch.test_slurm import User

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

HOSTILE = (
    "a'b",
    'a"b',
    "$(touch CANARY)",
    "`touch CANARY`",
    "a;touch CANARY",
    "a\ntouch CANARY",
    "exp\\''\ntouch CANARY #",
    "'\ntouch CANARY\n'",
    "a b",
    "é",
    "x" * 300,
    "%j",
    "a|touch CANARY",
    "a&&touch CANARY",
    "\x1b]0;a",
    "a\\",
    "*",
    "a\rb",
)
FIELDS = (
    "partition",
    "account",
    "qos",
    "reservation",
    "constraint",
    "exclude",
    "comment",
    "gpu_type",
    "modules",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("cluster") / "slurm", nodes=2, gpus=1) as made:
        yield made


@pytest.fixture
def user(cluster: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    yield User(cluster, tmp_path)
    cluster.slurm("scancel", "--user", "root")


def _hostile(folder: Path) -> list[str]:
    return [text.replace("CANARY", str(folder / "canary")) for text in HOSTILE]


def test_profiles(user: User) -> None:
    tried = accepted = 0
    for field in FIELDS:
        for text in _hostile(user.folder):
            value = json.dumps([text] if field == "modules" else text)
            words = ["submit", user.recipe(8), "--out", f"run{tried}", "--on", "two.yaml"]
            words += [
                "--set",
                f"{field}={value}",
                *(["--set", "gpus_per_node=1"] * (field == "gpu_type")),
            ]
            done = CliRunner().invoke(app, words)
            tried += 1
            # What Slurm itself has to judge, such as a feature *, goes to it as it is.
            assert done.exit_code == 2, (field, text, done.output)
            assert len(done.stderr.splitlines()) == 1
            if "Slurm refuses the job" in done.stderr:
                accepted += 1
            else:
                assert re.search(rf"\b{field}\b", done.stderr), (field, done.stderr)
            assert not jobs_of(user.folder / f"run{tried}")
    assert tried == 162
    assert accepted <= 2
    assert not (user.folder / "canary").exists()


def test_variables_reach_the_ranks_as_they_are(user: User) -> None:
    texts = [text for text in _hostile(user.folder) if not set("\x1b\r") & set(text)]
    variables = {f"HOSTILE_{number}": text for number, text in enumerate(texts)}
    written = json.dumps({"nodes": 1, "time": "01:00:00", "environment": variables})
    (user.folder / "hostile.yaml").write_text(written)
    user.submits(user.recipe(100_000), "--out", "run", on="hostile.yaml")
    user.waits_for_training("run")
    content = Path(f"/proc/{user.ranks()[0]}/environ").read_bytes().split(b"\0")
    for name, text in variables.items():
        assert f"{name}={text}".encode() in content
    assert not (user.folder / "canary").exists()


def test_paths(user: User) -> None:
    accepted = []
    for number, text in enumerate(_hostile(user.folder)):
        out = f"runs{number}/{text.replace('/', '_')}"
        words = ["submit", user.recipe(8), "--out", out, "--on", "two.yaml"]
        done = CliRunner().invoke(app, words)
        if done.exit_code == 0:
            accepted.append(out)
        else:
            assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.output
            assert "--out: " in done.stderr
            assert not Path(out).parent.exists()
    assert [out.partition("/")[2] for out in accepted] == ["a b", "é"]
    for out in accepted:
        user.waits_for(out)
        assert (user.folder / out / "result.json").exists()
        assert "pretrain: done" in user.log(out)
    assert not (user.folder / "canary").exists()


def test_overrides_and_recipes(user: User) -> None:
    finetune = "digits/5_finetune"
    for text in _hostile(user.folder):
        for key in ("parent", "labels.list", "data.kind"):
            value = f"{key}={json.dumps(text)}"
            words = ["submit", finetune, value, "--out", "run", "--on", "two.yaml"]
            done = CliRunner().invoke(app, words)
            assert done.exit_code in (2, 3), (text, done.output)
            assert key.rpartition(".")[2] in done.stderr
            done = CliRunner().invoke(app, ["submit", text, "--out", "run", "--on", "two.yaml"])
            assert done.exit_code == 2
            done = CliRunner().invoke(app, ["submit", finetune, "--out", "run", "--on", text])
            assert done.exit_code == 2
    assert not (user.folder / "canary").exists()
