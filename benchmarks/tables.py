"""What `benchmarks.parts` takes from each benchmark's result file: tables, and times to plot."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]
# Caption or nothing; rows; for each heading the keys that lead to its value, with dots between.
Table = tuple[str, list[Row], Mapping[str, str]]
Times = dict[str, dict[str, float]]  # by group and method, in a unit of the group


# --- loss ------------------------------------------------------------------------------------

_LOSS = {
    "pairs": "pairs",
    "threads": "threads",
    "method": "method",
    "median s": "median_seconds",
    "least s": "min_seconds",
    "spread": "spread",
    "as called s": "called_median_seconds",
    "peak MB": "peak_megabytes",
    "gradient error": "error",
    "time over lightly": "time_over.lightly",
    "least over lightly": "min_time_over.lightly",
    "over solo-learn": "time_over.solo",
    "over metric-learning": "time_over.metric-learning",
    "over strong": "time_over.strong",
    "memory over lightly": "memory_over.lightly",
    "memory over solo-learn": "memory_over.solo",
    "": "note",
}


def loss(result: Result) -> list[Table]:
    wrong = result["relative_errors_against_float64"]

    def row(found: Row) -> Row:
        error = wrong.get(str(found["pairs"]), {}).get(found["method"], {}).get("gradient")
        note = "out of memory" if found.get("out_of_memory") else None
        return {**found, "error": error, "note": note}

    apart = result["another_problem"]
    return [
        ("", [row(found) for found in result["results"]], _LOSS),
        (
            f"Another problem ({apart['what']})",
            [row(found) for found in apart["results"]],
            {heading: key for heading, key in _LOSS.items() if "over" not in heading},
        ),
    ]


def loss_times(result: Result) -> Times:
    found: Times = defaultdict(dict)
    threads = min(row.get("threads", 0) for row in result["results"])
    for row in result["results"]:
        # The cubic loss has its only sizes below the others'.
        if row.get("threads", 0) == threads and "median_seconds" in row and row["pairs"] >= 1024:
            found[f"loss of {row['pairs']} pairs"][row["method"]] = row["median_seconds"]
    return found


# --- optimizer -------------------------------------------------------------------------------

_OPTIMIZER = {
    "network": "model",
    "threads": "threads",
    "method": "method",
    "median ms": "median_milliseconds",
    "least ms": "min_milliseconds",
    "peak MB": "peak_megabytes",
    "GB/s": "gigabytes_per_second",
    "error": "error",
    "time over 30-byte floor": "time_over_30_byte_floor",
    "time over lightly": "time_over_lightly",
    "least over lightly": "min_over_lightly",
}


def optimizer(result: Result) -> list[Table]:
    wrong = result["largest_errors_against_float64"]
    rows = [
        {
            **row,
            "model": result["settings"]["model"],
            "threads": found["threads"] if result["settings"]["device"] == "cpu" else None,
            "error": wrong[row["method"]],
        }
        for found in result["results"]
        for row in found["methods"]
    ]
    return [("", rows, _OPTIMIZER)]


def optimizer_times(result: Result) -> Times:
    rows = result["results"][0]["methods"]
    group = f"LARS of {result['settings']['model']}"
    return {group: {row["method"]: row["median_milliseconds"] for row in rows}}


# --- augment ---------------------------------------------------------------------------------

_AUGMENT = {
    "method": "method",
    "median us per view": "median_microseconds_per_view",
    "least us": "min_microseconds_per_view",
    "spread": "spread",
    "difference": "error",
    "time over plain": "time_over_plain",
}


def augment(result: Result) -> list[Table]:
    wrong = result["largest_differences_from_float64"]
    rows = [{**row, "error": wrong.get(row["method"])} for row in result["results"]]
    return [("", rows, _AUGMENT)]


def augment_times(result: Result) -> Times:
    key = "median_microseconds_per_view"
    return {"views": {row["method"]: row[key] for row in result["results"]}}


# --- step ------------------------------------------------------------------------------------

_STEP = {
    "network": "model",
    "images": "batch",
    "pixels": "size",
    "method": "method",
    "precision": "precision",
    "images/s": "images_per_second",
    "spread": "spread",
    "peak bytes": "peak_bytes",
    "ours over it": "ratio",
    "": "note",
}


def step(result: Result) -> list[Table]:
    rows = [
        {
            **{key: case[key] for key in ("model", "batch", "size")},
            **row,
            "method": method,
            "ratio": case["ratios"].get(f"ours_over_{method}"),
            "note": "out of memory" if row.get("out_of_memory") else None,
        }
        for case in result["cases"]
        for method, row in case["methods"].items()
    ]
    return [("", rows, _STEP)]


def step_times(result: Result) -> Times:
    return {
        f"step of {case['model']}": {
            method: 1 / row["images_per_second"]
            for method, row in case["methods"].items()
            if "images_per_second" in row
        }
        for case in result["cases"]
        if "images_per_second" in case["methods"].get("ours", {})
    }


# --- scaling ---------------------------------------------------------------------------------

_SCALING = {
    "strategy": "strategy",
    "scaling": "scaling",
    "ranks": "ranks",
    "global batch": "global_batch",
    "images/s": "images_per_second",
    "spread": "spread",
    "efficiency": "efficiency",
}


def scaling(result: Result) -> list[Table]:
    return [("", result["measured"], _SCALING)]


# --- kernels ---------------------------------------------------------------------------------

_NORM_ACT_WAYS = ("fused", "eager", "compiled")
_NORM_ACT = {"all 53, ms": "method", "forward": "forward", "backward": "backward"}
_NORM_ACT_LAYERS = {
    "layer": "layer",
    "count": "count",
    **{
        f"{name}, of a copy": f"passes.{name}.fraction_of_copy"
        for name in ("statistics", "apply", "sums", "gradients")
    },
    **{
        f"{way} {direction} ms": f"methods.{way}.{direction}.median_ms"
        for way in _NORM_ACT_WAYS
        for direction in ("forward", "backward")
    },
}


def norm_act(result: Result) -> list[Table]:
    layers = ("Each layer", result["layers"], _NORM_ACT_LAYERS)
    if "cut" in result:
        return [layers]
    totals = [{"method": way, **ms} for way, ms in result["network_milliseconds"].items()]
    return [("", totals, _NORM_ACT), layers]


def norm_act_times(result: Result) -> Times:
    if "cut" in result:  # the sum is of all layers
        return {}
    ways = result["network_milliseconds"].items()
    return {"batch norm": {way: sum(both.values()) for way, both in ways}}


_SELECT = {
    "network": "network",
    "features": "features",
    "side": "side",
    "method": "way",
    "median ms": "median_ms",
    "least ms": "min_ms",
    "forward ms": "median_forward_ms",
    "of a copy": "share_of_copy",
    "time over eager": "time_over_eager",
}


def select(result: Result) -> list[Table]:
    return [("", result["results"], _SELECT)]


def select_times(result: Result) -> Times:
    found: Times = defaultdict(lambda: defaultdict(float))
    if "cut" in result:  # sums are of all layers of a network
        return found
    for row in result["results"]:
        found[f"selective kernels of {row['network']}"][row["way"]] += row["median_ms"]
    return found


# --- loader ----------------------------------------------------------------------------------

_LOADER = {
    "decoder": "decoder",
    "source": "source",
    "workers": "workers",
    "images/s": "images_per_second",
    "spread": "spread",
    "CPU ms per image": "cpu_milliseconds_per_image",
    "over torch + PIL": "over_torch_and_pil",
    "CPU over theirs": "cpu_of_torch_and_pil",
}
_LOADER_TRAINING = {
    "network": "network",
    "images": "images",
    "step s, one batch again": "seconds_without",
    "step s, with loader": "seconds_with",
    "speed with over without": "speed_with_over_without",
    "least": "least",
    "share waited": "waited",
}


def loader(result: Result) -> list[Table]:
    training = "Training with one worker, and with one batch again and again"
    return [("", result["results"], _LOADER), (training, [result["training"]], _LOADER_TRAINING)]


# --- agreement -------------------------------------------------------------------------------

_AGREEMENT = {
    "decoder": "decoder",
    "images": "images",
    "same order, boxes, flips": "views_equal",
    "mean difference": "mean_steps",
    "share within two": "share_within_two_steps",
    "most": "most_steps",
}


def agreement(result: Result) -> list[Table]:
    return [("", result["results"], _AGREEMENT)]


# --- digits ----------------------------------------------------------------------------------

_DIGITS = {
    "labels per class": "labels_per_class",
    "method": "method",
    "accuracy": "mean",
    "deviation": "std",
    "label draws": "draws",
}


def digits(result: Result) -> list[Table]:
    return [("", result["label_efficiency"], _DIGITS)]


# --- glance ----------------------------------------------------------------------------------

_GLANCE = {
    "what": "what",
    "unit": "unit",
    "median": "median",
    "least": "least",
    "most": "most",
    "the GPU works, us": "busy_microseconds",
    "commit": "commit",
}
_GLANCE_KERNELS = {"what": "what", "kernel": "kernel", "us": "microseconds"}


def glance(result: Result) -> list[Table]:
    kernels = [
        {"what": row["what"], "kernel": f"`{name}`", "microseconds": taken}
        for row in result["figures"]
        for name, taken in row["kernels"].items()
    ]
    figures = [{**row, "commit": row["commit"] or result["commit"]} for row in result["figures"]]
    return [("", figures, _GLANCE), ("The kernels that take most of it", kernels, _GLANCE_KERNELS)]
