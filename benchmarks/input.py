"""The input on a GPU: JPEGs decoded by its hardware and by the CPU, and what training notices.

    python -m benchmarks.input --data FOLDER -o benchmarks/results/input.json

FOLDER holds JPEGs or tar shards of them; few are enough, since a stream begins again at its end. A
hundred ImageNet photographs are 11 MB. What is not installed or fails is left out, and named.
DALI and nvImageCodec reach the hardware through nvJPEG (pip install nvidia-nvjpeg, for CUDA 13).

    decode     whole images by nvImageCodec alone, as `benchmarks.decode` says, beside Pillow's.
    rates      images per second of the loader, two crops of 224 pixels each, on the device, by each
               decoder with as many worker processes: Pillow and libjpeg-turbo decode and crop in
               the workers; for DALI they only read, and it has as many threads. On a GPU it decodes
               with the mixed decoder, which takes the hardware where there is some.
    agreement  every image once, by each decoder beside Pillow: equal views to the bit, and how far
               the pixels differ, in steps of 1/255.
    training   our training step, with each decoder and with one batch again and again, views
               included, in turns.

Workers start and buffers fill before the clock does: it runs from the arrival of a batch to that of
a later one, and on a GPU waits for both. Medians count; the spread is largest less smallest over
the median. With the loader and without it alternate, and their ratio is that of the same round.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks import decode as nvimagecodec
from benchmarks.agreement import compare
from benchmarks.loader import DISTORTED, SETTINGS, SIDE, VIEWS, installed, loader_of
from benchmarks.loops import Case, OurLoop, Ways, views_of
from benchmarks.machine import machine
from bigsimclr.augment.device import make_views
from bigsimclr.data import Source
from bigsimclr.data.decode import decode
from bigsimclr.data.decoders import Decoder
from bigsimclr.data.folder import training_folder
from bigsimclr.data.loader import Batch
from bigsimclr.data.shards import open_shards
from bigsimclr.data.steps import Means
from bigsimclr.errors import BigSimCLRError
from bigsimclr.kernels import uses_triton
from bigsimclr.stages.run_directory import source_commit
from bigsimclr.world import ALONE, World, keep_freed_memory, use_device

WARM: Final = 4  # steps before the clock runs; more than the loader has ahead
MOST_PIXELS: Final = 64_000_000  # of an image
MISSING: Final = {
    "turbo": "simplejpeg is not installed",
    "dali": "nvidia-dali is not installed",
    "nvimagecodec": "nvidia-nvimgcodec is not installed",
}
# Of packages that are there, but not all that they need.
FAILURES: Final = (BigSimCLRError, ImportError, OSError, RuntimeError)
PACKAGES: Final = (
    "simplejpeg",
    *("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"),
    *("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12"),
)


def opened(data: Path) -> Source:
    """Open a folder of JPEGs, or of tar shards."""
    if any(data.glob("*.tar")):
        return open_shards(data, "*.tar")
    return training_folder(data, ".", labelled=False)


def now(device: torch.device) -> float:
    """Return the time at which the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batches_of(
    source: Source, means: Means, batch: int, *, first: int, steps: int
) -> Iterator[Batch]:
    return loader_of(source, batch, means, DISTORTED).batches(first, steps)


def said(error: Exception) -> str:
    return f"it fails: {' '.join(str(error).split())}"


def usable(source: Source, world: World) -> tuple[list[Decoder], dict[str, str]]:
    """Return the decoders that bring a batch here, and why the others do not."""
    found, left_out = list[Decoder](), {}
    for decoder in installed():
        try:
            means = Means(workers=1, device=world.device, decoder=decoder)
            for _ in batches_of(source, means, 8, first=0, steps=1):
                found.append(decoder)
        except FAILURES as error:
            left_out[decoder] = said(error)
    absent = {"turbo", "dali"} - set(installed())
    if not nvimagecodec.is_installed():
        absent.add("nvimagecodec")
    return found, left_out | {name: MISSING[name] for name in sorted(absent)}


def rate(source: Source, means: Means, batch: int, *, first: int, steps: int) -> float:
    """Return images per second over some steps, after the first few."""
    stream = batches_of(source, means, batch, first=first, steps=WARM + steps)
    with closing(stream):  # type: ignore[type-var] # a generator
        for _ in range(WARM):
            next(stream)
        begin = now(means.device)
        images = sum(len(found) for found in stream)
        return images / (now(means.device) - begin)


def rates(
    source: Source,
    decoders: list[Decoder],
    device: torch.device,
    *,
    workers: list[int],
    batch: int,
    steps: int,
    rounds: int,
) -> list[dict[str, object]]:
    """Measure every decoder with every number of workers, in turns, and print the table."""
    ways = [(decoder, number) for number in workers for decoder in decoders]
    taken: dict[tuple[Decoder, int], list[float]] = {way: [] for way in ways}
    for round_ in range(rounds):
        for decoder, number in ways if round_ % 2 == 0 else reversed(ways):
            means = Means(workers=number, device=device, decoder=decoder)
            first = round_ * (WARM + steps) * batch
            taken[decoder, number].append(rate(source, means, batch, first=first, steps=steps))
    rows: list[dict[str, object]] = []
    for (decoder, number), found in taken.items():
        median = statistics.median(found)
        pillow = taken["pillow", number]
        ratio = statistics.median(own / other for own, other in zip(found, pillow, strict=True))
        rows.append(
            {
                "decoder": decoder,
                "workers": number,
                "images_per_second": round(median, 1),
                "spread": round((max(found) - min(found)) / median, 3),
                "over_pillow": round(ratio, 3),
            }
        )
        print(
            f"{decoder:>7} {number:>3} workers {median:>9.1f} images/s {ratio:>7.2f}x", flush=True
        )
    return rows


def train_step(case: Case, world: World) -> Callable[[Batch], object]:
    """Return our training step on batches of the loader, views included."""
    device = world.device
    fused = uses_triton("auto", device)
    ways = Ways("auto", "none", cuda_graph=False)
    loop = OurLoop(case, views_of(case, device).channels_last, world, ways)

    def step(found: Batch) -> object:
        views = make_views(found.pixels, found.draws, DISTORTED, device=device, fused=fused)
        return loop.update(views, found)

    return step


def training(
    source: Source,
    decoders: list[Decoder],
    world: World,
    *,
    network: str,
    workers: int,
    batch: int,
    steps: int,
    rounds: int,
) -> list[dict[str, object]]:
    """Time steps with the loader and with one batch, in turns, and print the table."""
    device = world.device
    step = train_step(Case(network, batch, SIDE), world)
    alone = Means(workers=workers, device=device)
    (one,) = batches_of(source, alone, batch, first=0, steps=1)
    for _ in range(WARM):
        step(one)

    def seconds(batches: Iterator[Batch]) -> float:
        begin = now(device)
        for _ in range(steps):
            step(next(batches))
        return (now(device) - begin) / steps

    taken: dict[Decoder, list[tuple[float, float]]] = {decoder: [] for decoder in decoders}
    for round_ in range(rounds):
        for decoder in decoders:
            means = Means(workers=workers, device=device, decoder=decoder)
            first = round_ * (WARM + steps) * batch
            stream = batches_of(source, means, batch, first=first, steps=WARM + steps)
            with closing(stream):  # type: ignore[type-var] # a generator
                for _ in range(WARM):
                    step(next(stream))
                with_loader = seconds(stream)
            taken[decoder].append((with_loader, seconds(iter([one] * steps))))
    rows: list[dict[str, object]] = []
    for decoder, found in taken.items():
        ratios = [without / with_loader for with_loader, without in found]
        both = [batch / statistics.median(times) for times in zip(*found, strict=True)]
        rows.append(
            {
                "decoder": decoder,
                "workers": workers,
                "images_per_second_with": round(both[0], 1),
                "images_per_second_without": round(both[1], 1),
                "speed_with_over_without": round(statistics.median(ratios), 4),
                "least": round(min(ratios), 4),
            }
        )
        print(
            f"{network} with {decoder} {both[0]:.1f} images/s, without a loader {both[1]:.1f}: "
            f"{statistics.median(ratios):.3f}",
            flush=True,
        )
    return rows


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parts(
    source: Source,
    decoders: list[Decoder],
    world: World,
    left_out: dict[str, str],
    options: argparse.Namespace,
) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Yield each part of the results when it is measured; `left_out` may grow."""
    often = {"steps": options.steps, "rounds": options.rounds}
    found = [compare(source, decoder=d, device=world.device) for d in decoders if d != "pillow"]
    print(*(json.dumps(row) for row in found), sep="\n")
    yield "agreement", found
    among = {"workers": options.workers, "batch": options.batch}
    yield "rates", rates(source, decoders, world.device, **among, **often)
    of_network = {"workers": max(options.workers), "batch": options.network_batch}
    yield (
        "training",
        training(source, decoders, world, network=options.network, **of_network, **often),
    )
    if "nvimagecodec" in left_out:
        return
    files = [source.read(row).image for row in range(len(source))]
    pillow = partial(decode, max_pixels=MOST_PIXELS)
    ways = {"workers": options.workers, "batches": 4 * options.steps, "rounds": options.rounds}
    try:
        yield "decode", nvimagecodec.measure(files, pillow, **ways)
    except FAILURES as error:
        left_out["nvimagecodec"] = said(error)
        yield "decode", []


def main() -> None:
    """Measure, and write the result file after each part, so that none is lost."""
    on_gpu = torch.cuda.is_available()
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEGs or tar shards")
    several = sorted({max(1, cores // 2), cores})
    parser.add_argument("--workers", type=int, nargs="+", default=several)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 32)
    parser.add_argument("--steps", type=int, default=8 if on_gpu else 6, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="r50-1x" if on_gpu else "r18")
    parser.add_argument("--network-batch", type=int, default=256 if on_gpu else 8)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, object] = {**machine(), **versions()}
    if on_gpu:
        facts["gpu"] = torch.cuda.get_device_name()
    keep_freed_memory()
    world = use_device(ALONE, "cuda" if on_gpu else "cpu")
    source = opened(options.data)
    decoders, left_out = usable(source, world)
    result: dict[str, object] = {
        "command": " ".join(["python", "-m", "benchmarks.input", *sys.argv[1:]]),
        "commit": source_commit(),
        "device": world.device.type,
        "machine": facts,
        "settings": {
            "images": len(source),
            "image_size": SIDE,
            "views": VIEWS,
            "resize": SETTINGS.resize,
            "batch": options.batch,
            "steps": options.steps,
            "rounds": options.rounds,
            "network": options.network,
            "network_batch": options.network_batch,
        },
        "left_out": left_out,
    }
    for part, measured in parts(source, decoders, world, left_out, options):
        result[part] = measured
        if options.output is not None:
            text = json.dumps(result, indent=2) + "\n"
            options.output.write_text(text, encoding="utf-8")
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")


if __name__ == "__main__":
    main()
