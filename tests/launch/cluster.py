"""A cluster's commands as small shell scripts, and texts that would like to be commands."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from bigsimclr.errors import BigSimCLRError

T = TypeVar("T")

PROFILE = "time: 02:00:00\n"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, /, **programs: str) -> Path:
    """Put programs on PATH, before the system's own; each is the body of a shell script.

    Returns:
        The file in which every call is noted, one line with the program's name and words.
    """
    programs_folder = folder / "programs"
    programs_folder.mkdir(exist_ok=True)
    calls = folder / "calls"
    calls.touch()
    for name, body in programs.items():
        file = programs_folder / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\n{body}\n')
        file.chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs_folder}:/usr/bin:/bin")
    return calls


def answer(text: str) -> str:
    """Return a script that prints a text, whatever is in it."""
    return f"cat <<'END_OF_ANSWER'\n{text.rstrip()}\nEND_OF_ANSWER"


def refusal(program: str, text: str) -> str:
    """Return a script that complains as Slurm's commands do, and fails."""
    return f"echo '{program}: error: {text}' >&2; exit 1"


def outcome(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a call returns, or None and what it says instead, in clean lines."""
    try:
        return call(), ""
    except BigSimCLRError as error:
        text = str(error)
    assert all(line.isprintable() for line in text.split("\n")), text
    return None, text


_PIECES = (
    "'",
    '"',
    "`touch canary`",
    "$(touch canary)",
    "${IFS}",
    "$HOME",
    ";touch canary;",
    "|touch canary",
    "&touch canary&",
    "&&touch canary",
    "||touch canary",
    ">canary",
    "<(touch canary)",
    "\ntouch canary\n",
    "\r\ntouch canary\r\n",
    "\n#SBATCH --uid=0\n",
    "\\''\ntouch canary\n#",
    "'\ntouch canary\n'",
    '"\ntouch canary\n"',
    "\\",
    "\\n",
    "%j",
    "%A_%a",
    "%",
    "!!",
    "#",
    " #SBATCH --uid=0",
    "*",
    "?",
    "~",
    "[a-z]",
    "{a,b}",
    "(a)",
    "^",
    "\t",
    "\0",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\x85",
    "\xa0",
    "\u2028",
    "\u2029",
    "\u202e",
    "\ufeff",
    "\ufffe",
    "\u00e9",
    "\u540d\u524d",
    "\U0001f600",
    "a" * 300,
    " ",
    ",",
    "=",
    ":",
    "@",
)
WHOLE = ("", "-", "--", "-x", "--uid=0", "--help", "..", "../x", "/", "null", "true", "1e3", "<<")
HOSTILE = tuple(dict.fromkeys([*WHOLE, *_PIECES, *(f"a{piece}b" for piece in _PIECES)]))
