"""Why targets were missed, as the results tell it: a sentence each, nothing where they do not."""

from collections.abc import Callable
from typing import Final

from benchmarks.kernel_classes import OURS
from benchmarks.markdown import number
from benchmarks.predictions import Results
from benchmarks.tables import Row

LEAST_SHARE: Final = 0.01  # of a step's kernels; classes below it are left out


def lars_is_bound(results: Results) -> str:
    """Say what binds an update on a CPU."""
    found = results["optimizer"]["results"][0]
    rows = {
        row["method"]: row["gigabytes_per_second"]
        for row in found["methods"]
        if row["method"] != "sgd"
    }
    copied = found["copied_gigabytes_per_second"]
    return (
        "memory binds an update on a CPU. On one thread ours moves its bytes at "
        f"{rows['plain'] / copied:.0%} of the speed of a copy, at which an update is "
        f"{number(copied / rows['lightly'])} times as fast as lightly's."
    )


def step_is_spent(name: str, model: str, batch: int, theirs: str = "") -> Callable[[Results], str]:
    """Say, of a race with profiles, what our step takes its time for, and perhaps theirs."""

    def why(results: Results) -> str:
        for case in results.get(name, {}).get("cases", ()):
            rows: dict[str, Row] = {
                method: row for method, row in case["methods"].items() if "profile" in row
            }
            if (case["model"], case["batch"]) == (model, batch) and "ours" in rows:
                raced = [method for method in ("ours", theirs) if method in rows]
                return "; ".join(_spent(method, rows[method], batch) for method in raced) + "."
        return ""

    return why


def glance_is_spent(results: Results, what: str) -> str:
    """Say what took the time of a figure of the first look at a GPU."""
    for row in results.get("glance-gpu", {}).get("figures", ()):
        if row["what"] == what and row["kernels"]:
            ours = {name: taken for name, taken in row["kernels"].items() if name in OURS}
            listed = ", ".join(f"{name} {number(taken)}" for name, taken in ours.items())
            rest = number(row["busy_microseconds"] - sum(ours.values()))
            busy = number(row["busy_microseconds"])
            return f"the GPU works {busy} us for all of it: {listed}, others {rest}."
    return ""


def _spent(method: str, row: Row, batch: int) -> str:
    profile = row["profile"]
    parts = {
        kind: found["microseconds"] / 1e3
        for kind, found in profile["classes"].items()
        if found["share"] >= LEAST_SHARE
    }
    listed = ", ".join(
        f"{kind} {number(taken)}"
        for kind, taken in sorted(parts.items(), key=lambda part: part[1], reverse=True)
    )
    step, busy = 1e3 * batch / row["images_per_second"], profile["busy_milliseconds"]
    return f"{method} takes {number(step)} ms a step, the GPU works {number(busy)} ({listed})"
