"""Images per second of the loader beside a DataLoader over PIL, and what training notices of it.

    python -m benchmarks.loader --images FOLDER -o benchmarks/results/loader.json

Every way starts from the same encoded photographs and ends with batches of two float32 crops of 224
pixels of each image [B,3,224,224] in the training process; colours and blur are left to the device.

    torch + PIL  a DataLoader with its own collating over the usual transforms: RandomResizedCrop,
                 bicubic, two views of an image that is decoded once, then a tensor in [0, 1]. They
                 are written here from torchvision's definition, which is not imported.
    pillow       ours: order and crops by keys, Pillow decodes, the official kernel resizes
    turbo        the same, plain JPEGs decoded by libjpeg-turbo itself, if simplejpeg is installed
    dali         ours: DALI decodes and cuts on the CPU, with as many threads as there are workers;
                 where it is installed. A GPU is what it is for.

A measurement is a stream of `--count` images from its start, workers included, to its last batch.
Every round measures every way once, in turns; medians count. CPU seconds are of all processes.

Last, steps of a network with the loader and with one batch again and again, in turns: what training
loses to the loader where the network is the slower of the two.
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.loops import Case, dense_nt_xent, initial_weights
from benchmarks.machine import machine
from benchmarks.networks import network
from benchmarks.plain_network import plain_network
from bigsimclr.augment import ViewSettings
from bigsimclr.augment.device import make_views
from bigsimclr.data import Source
from bigsimclr.data.folder import training_folder
from bigsimclr.data.loader import Batch, Loader
from bigsimclr.data.pack import pack
from bigsimclr.data.shards import open_shards
from bigsimclr.data.steps import Means
from bigsimclr.stages.run_directory import source_commit

if TYPE_CHECKING:
    from bigsimclr.data.decoders import Decoder

SIDE: Final = 224
VIEWS: Final = 2
SETTINGS: Final = ViewSettings(image_size=SIDE)
DISTORTED: Final = ViewSettings(
    image_size=SIDE,
    colour_strength=1.0,
    colour_probability=0.8,
    grey_probability=0.2,
    blur_probability=0.5,
)
CPU: Final = torch.device("cpu")
GENERATED: Final = 256  # images, where no folder is named


class Photographs(Dataset[tuple[Tensor, Tensor]]):
    """Two random crops of each file, as the usual transforms make them."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return two tensors [3,224,224]."""
        with Image.open(self._files[index]) as image:
            whole = image.convert("RGB")
        return tensor_of(random_crop(whole)), tensor_of(random_crop(whole))


def random_crop(image: Image.Image) -> Image.Image:
    """Cut and resize a random box.

    Source: torchvision, transforms.RandomResizedCrop.get_params, with the area of SimCLR.
    """
    width, height = image.size
    area = width * height
    low, high = math.log(SETTINGS.crop_aspect[0]), math.log(SETTINGS.crop_aspect[1])
    for _ in range(10):
        share = area * torch.empty(1).uniform_(*SETTINGS.crop_area).item()
        aspect = math.exp(torch.empty(1).uniform_(low, high).item())
        w, h = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
        if 0 < w <= width and 0 < h <= height:
            y = int(torch.randint(0, height - h + 1, (1,)).item())
            x = int(torch.randint(0, width - w + 1, (1,)).item())
            break
    else:
        w = h = min(width, height)
        y, x = (height - h) // 2, (width - w) // 2
    box = image.crop((x, y, x + w, y + h))
    return box.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def tensor_of(image: Image.Image) -> Tensor:
    """Return float32 [3,H,W] in [0, 1]; source: torchvision, functional.to_tensor."""
    pixels = torch.from_numpy(np.array(image, copy=True))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


@dataclass(frozen=True)
class Way:
    """One way to get batches."""

    decoder: str
    source: str
    workers: int
    read: Callable[[int], Iterator[int]]  # images -> the size of each batch


def by_torch(files: list[Path], workers: int, batch: int, count: int) -> Iterator[int]:
    # One stream of just these images, as ours: no worker starts again, or works in vain.
    wanted = math.ceil(count / batch) * batch
    rounds = math.ceil(wanted / len(files))
    shown = torch.cat([torch.randperm(len(files)) for _ in range(rounds)])[:wanted].tolist()
    batches = DataLoader(
        Photographs(files),
        batch_size=batch,
        sampler=shown,
        num_workers=workers,
    )
    for first, _ in batches:
        yield len(first)


def loader_of(source: Source, batch: int, means: Means, settings: ViewSettings) -> Loader:
    return Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=settings,
        views=VIEWS,
        seed=0,
        global_batch=batch,
        means=means,
    )


def by_ours(source: Source, means: Means, batch: int, count: int) -> Iterator[int]:
    loader = loader_of(source, batch, means, SETTINGS)
    for found in loader.batches(0, math.ceil(count / batch)):
        yield len(found)


def sources(folder: Path, scratch: Path) -> dict[str, Source]:
    """Open every source of the same photographs; another one is another line here."""
    files = training_folder(folder, ".", labelled=False)
    pack(files, scratch / "shards")
    found: dict[str, Source] = {"folder": files, "shards": open_shards(scratch / "shards", "*.tar")}
    if importlib.util.find_spec("pyarrow") is not None:
        from bigsimclr.data.parquet import open_parquet

        write_parquet(files_in(folder), scratch / "photographs.parquet")
        found["parquet"] = open_parquet(scratch, "*.parquet")
    return found


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})


def write_parquet(files: list[Path], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), path, row_group_size=100)


def generate(folder: Path, count: int = GENERATED) -> None:
    """Write JPEGs of the size of ImageNet's, where no photographs are at hand."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        grain = generator.integers(-12, 13, (375, 500, 3))
        pixels = (np.asarray(picture).astype(np.int64) + grain).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        (folder / f"{number:04d}.jpg").write_bytes(stream.getvalue())


def cpu_seconds() -> float:
    """Return what this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(ways: list[Way], *, count: int, rounds: int) -> list[dict[str, object]]:
    """Measure all ways in turns and print the table."""
    rates: dict[Way, list[float]] = {way: [] for way in ways}
    costs: dict[Way, list[float]] = {way: [] for way in ways}
    for way in ways:
        sum(way.read(1))
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            used, begin = cpu_seconds(), time.perf_counter()
            images, last = 0, begin
            for size in way.read(count):
                images, last = images + size, time.perf_counter()
            rates[way].append(images / (last - begin))
            # That of workers is known when they have ended.
            costs[way].append((cpu_seconds() - used) / images)
    rows: list[dict[str, object]] = []
    print(
        f"{'decoder':>12} {'source':>8} {'workers':>7} {'images/s':>9} {'spread':>7} {'CPU ms':>7}"
    )
    for way in ways:
        low, median, high = statistics.quantiles(rates[way], n=4)
        theirs = next(w for w in ways if w.decoder == "torch + PIL" and w.workers == way.workers)
        # Of the same round each: a busy machine meets both.
        ratios = [own / other for own, other in zip(rates[way], rates[theirs], strict=True)]
        cost = statistics.median(costs[way])
        row = {
            "decoder": way.decoder,
            "source": way.source,
            "workers": way.workers,
            "images_per_second": round(median, 1),
            "spread": round((high - low) / median, 3),
            "cpu_milliseconds_per_image": round(cost * 1e3, 3),
            "over_torch_and_pil": round(statistics.median(ratios), 3),
            "cpu_of_torch_and_pil": round(cost / max(statistics.median(costs[theirs]), 1e-9), 3),
        }
        rows.append(row)
        print(
            f"{way.decoder:>12} {way.source:>8} {way.workers:>7} {median:>9.1f} "
            f"{row['spread']:>7.1%} {cost * 1e3:>7.2f} {row['over_torch_and_pil']:>6.2f}x"
        )
    return rows


def installed() -> list["Decoder"]:
    """Return the decoders that this machine has."""
    found: list[Decoder] = ["pillow"]
    if importlib.util.find_spec("simplejpeg") is not None:
        found.append("turbo")
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        found.append("dali")
    return found


def ways_of(folder: Path, scratch: Path, batch: int) -> list[Way]:
    found: list[Way] = []
    opened = sources(folder, scratch)
    for workers in (1, 2):
        read = partial(by_torch, files_in(folder), workers, batch)
        found.append(Way("torch + PIL", "folder", workers, read))
        for decoder, name in itertools.product(installed(), opened):
            if decoder == "dali" and name != "folder":
                continue  # workers read for it, as they do for the others
            read = partial(by_ours, opened[name], Means(workers=workers, decoder=decoder), batch)
            found.append(Way(decoder, name, workers, read))
    return found


def train_step(name: str, batch: int) -> Callable[[Batch], None]:
    """Return an update of a network by plain PyTorch, views included."""
    case = Case(name, batch, SIDE)
    model = plain_network(network(name), initial_weights(case))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(found: Batch) -> None:
        views = make_views(found.pixels, found.draws, DISTORTED, device=CPU)
        first, second = F.normalize(model(views)).chunk(2)
        dense_nt_xent(first, second).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(folder: Path, *, name: str, batch: int, steps: int, rounds: int) -> dict[str, object]:
    """Time steps with the loader and with one batch, in turns."""
    loader = loader_of(
        training_folder(folder, ".", labelled=False), batch, Means(workers=1), DISTORTED
    )
    step = train_step(name, batch)
    one = next(iter(loader.batches(0, 1)))
    step(one)
    with_loader: list[float] = []
    without: list[float] = []
    waited: list[float] = []
    for number in range(rounds):
        wait = 0.0
        begin = time.perf_counter()
        batches = loader.batches(number * steps * batch, steps)
        for _ in range(steps):
            asked = time.perf_counter()
            found = next(batches)
            wait += time.perf_counter() - asked
            step(found)
        with_loader.append((time.perf_counter() - begin) / steps)
        waited.append(wait / steps)
        begin = time.perf_counter()
        for _ in range(steps):
            step(one)
        without.append((time.perf_counter() - begin) / steps)
    ratios = np.array(without) / np.array(with_loader)
    result = {
        "network": name,
        "images": batch,
        "steps": steps,
        "rounds": rounds,
        "seconds_without": round(statistics.median(without), 4),
        "seconds_with": round(statistics.median(with_loader), 4),
        "speed_with_over_without": round(float(np.median(ratios)), 4),
        "least": round(float(ratios.min()), 4),
        "waited": round(statistics.median(waited) / statistics.median(with_loader), 5),
    }
    print(json.dumps(result))
    return result


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; without it some are made up")
    parser.add_argument("--count", type=int, default=1024, help="images of a measurement")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", default="r18", help="trained with and without the loader")
    parser.add_argument("--steps", type=int, default=4, help="of it, in a round")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for a spread")
    torch.set_num_threads(1)
    facts = machine()
    with tempfile.TemporaryDirectory() as made:
        folder, scratch = options.images, Path(made)
        if folder is None:
            folder = scratch / "images"
            generate(folder)
        files = files_in(folder)
        if len(files) != len(training_folder(folder, ".", labelled=False)):
            parser.error(f"{folder}: not all of its images are JPEGs")
        ways = ways_of(folder, scratch, options.batch)
        rows = measure(ways, count=options.count, rounds=options.rounds)
        trained = training(
            folder, name=options.network, batch=8, steps=options.steps, rounds=options.rounds
        )
        settings = {
            "photographs": len(files) if options.images else 0,
            "images_made_up": 0 if options.images else len(files),
            "bytes_of_an_image": round(sum(file.stat().st_size for file in files) / len(files)),
            "image_size": SIDE,
            "views": VIEWS,
            "batch": options.batch,
            "count": options.count,
            "rounds": options.rounds,
        }
    result = {
        "command": " ".join(["python", "-m", "benchmarks.loader", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": facts,
        "settings": settings,
        "results": rows,
        "training": trained,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
