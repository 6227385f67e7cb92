"""Result files that are written after each part, so that a run which is stopped keeps them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigsimclr.storage import publish


@dataclass(frozen=True)
class ResultFile:
    """Where findings go; while parts are missing, the key `cut` says how many of how many."""

    path: Path | None  # None: nowhere
    facts: Mapping[str, object]  # command, commit, machine, settings
    what: str  # the parts are

    def write(self, found: Mapping[str, object], *, measured: int, of: int) -> None:
        """Replace the file."""
        if self.path is None:
            return
        cut = {"cut": {"measured": measured, "of": of, "what": self.what}}
        content = {**self.facts, **(cut if measured < of else {}), **found}
        publish(self.path, json.dumps(content, indent=1) + "\n")
