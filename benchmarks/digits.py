"""The digits pipeline as it ships: accuracy by number of labels, and how long it takes.

Run from the root of the repository: python -m benchmarks.digits
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine
from bigsimclr.stages.run_directory import environment

RESULTS = Path(__file__).parent / "results" / "digits.json"


def main() -> None:
    """Run the pipeline in a fresh directory and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "digits"
        command = ["bigsimclr", "run", "digits"]
        facts = {**environment(), "machine": machine()}
        started = time.monotonic()
        whole = [sys.executable, "-m", *command, "--out", str(run), "--quiet"]
        subprocess.run(whole, check=True)  # noqa: S603 - made here
        seconds = time.monotonic() - started
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    result = {
        "command": "python -m benchmarks.digits",
        "measured": shlex.join(command),
        "environment": facts,
        "seconds": round(seconds, 1),
        "verdict": report["verdict"],
        "label_efficiency": report["label_efficiency"],
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report["verdict"])


if __name__ == "__main__":
    main()
