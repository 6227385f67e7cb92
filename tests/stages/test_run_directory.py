"""What a run directory records of its source."""

import subprocess

from bigsimclr.stages.run_directory import source_commit


def git(tree, *words):
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(tree), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_tree_and_of_a_copy_without_git(tmp_path):
    assert source_commit(tmp_path) is None
    (tmp_path / ".commit").write_text("0123456789ab\n")
    assert source_commit(tmp_path) == "0123456789ab"
    (tmp_path / ".commit").write_text("\n")
    assert source_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "One")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert source_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert source_commit(tmp_path) == f"{commit}-dirty"
    # A copy's git may be older than its files.
    (tmp_path / ".commit").write_text("0123456789ab\n")
    assert source_commit(tmp_path) == "0123456789ab"
