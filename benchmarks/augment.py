"""Two SimCLR views from decoded images, side by side: ours, and what other pipelines do.

    python -m benchmarks.augment -o benchmarks/results/augment.json

Every method starts from one uint8 batch [B,3,S,S] on the device, of 224 pixels or as --side says,
and ends with 2B float32 views [2B,3,224,224] in channels_last: random crop, flip, colour jitter,
grey, blur.

    plain       `make_views`: batched PyTorch, every image with its own order of colour operations
    fused       the same in four kernels; on a GPU only, as is all that is fused
    fused bf16  the same, written as bfloat16
    per image   one view after another by PyTorch calls on one image, as a loader's transforms do
    batched     every operation on the whole batch and kept where it was drawn, all images in one
                order, as batched libraries do; it resamples by grid_sample
    kornia      kornia's own modules, if it is installed (no dependency, and it needs no
                torchvision); it draws its random numbers, the others are given theirs
    draw        drawing every decision on the host, which none of the others counts but kornia
    crop        the plain crop alone, flip included
    fused crop  its kernel

Per image and batched call the operations of `bigsimclr.augment.colour`, which are leaner than
those of torchvision or kornia. Before anything is measured their colours and blur are compared
with the plain ones in float64, and so are both crops; what resamples those of the others is
PyTorch's own bicubic, which is not TensorFlow's, and kornia's definitions differ in more, so these
are compared in time alone.

Every round runs every method once, in turns, so that a busy moment of the machine meets all of
them. The median of the rounds counts; the spread is that between the quartiles over the median.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine
from benchmarks.peers import imported
from bigsimclr.augment import ViewSettings
from bigsimclr.augment.colour import brightness_, contrast_, grey, hue_, saturation_
from bigsimclr.augment.device import blur, crop_resize, make_views
from bigsimclr.augment.draws import Draws, draw_views
from bigsimclr.stages.run_directory import source_commit

SIZE: Final = 224
RADIUS: Final = SIZE // 10 // 2
SETTINGS: Final = ViewSettings(
    image_size=SIZE,
    colour_strength=1.0,
    colour_probability=0.8,
    grey_probability=0.2,
    blur_probability=0.5,
)
OPERATIONS: Final = (brightness_, contrast_, saturation_, hue_)
# The operations round otherwise than in the reference, and no more.
TOLERANCE: Final = 1e-5

Method = Callable[[], object]


def draw(images: int, side: int) -> Draws:
    """Draw two views of images of a side in pixels."""
    return draw_views(
        SETTINGS,
        seed=0,
        epochs=np.zeros(images, np.int64),
        indices=np.arange(images),
        sizes=np.full((images, 2), side, np.int32),
    )


def crop_one(pixels: Tensor, draws: Draws, view: int, image: int) -> Tensor:
    y, x, height, width = draws.boxes[view, image].tolist()
    crop = pixels[image : image + 1, :, y : y + height, x : x + width].float().div_(255)
    return F.interpolate(crop, size=(SIZE, SIZE), mode="bicubic", align_corners=False)


def distort_one(crop: Tensor, draws: Draws, view: int, image: int, values: Tensor) -> Tensor:
    """Distort one crop [1,3,H,W]; `values` are its factors and its sigma, on the device."""
    where = (view, image)
    if draws.flip[where]:
        crop = crop.flip(-1)
    if draws.jitter[where]:
        for operation in draws.order[where].tolist():
            crop = OPERATIONS[operation](crop, values[operation : operation + 1]).clamp_(0, 1)
    if draws.grey[where]:
        crop = grey(crop).expand(-1, 3, -1, -1)
    crop = crop.clamp(0, 1)
    return blur(crop, values[4:5], radius=RADIUS).clamp_(0, 1) if draws.blur[where] else crop


def values_of(draws: Draws, like: Tensor) -> Tensor:
    """Return factors and sigma of every view [V,B,5], where the pixels are."""
    values = np.concatenate([draws.factors, draws.sigma[..., None]], axis=-1)
    kind = like.dtype if like.is_floating_point() else torch.float32
    return torch.from_numpy(values).to(like.device, kind)


def one_after_another(pixels: Tensor, draws: Draws) -> Tensor:
    values = values_of(draws, pixels)
    views = [
        distort_one(crop_one(pixels, draws, view, image), draws, view, image, values[view, image])
        for view in range(draws.views)
        for image in range(draws.images)
    ]
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


def crop_all(pixels: Tensor, draws: Draws) -> Tensor:
    boxes = torch.from_numpy(draws.boxes.reshape(-1, 4)).to(pixels.device).float()
    boxes /= pixels.shape[-1]
    theta = boxes.new_zeros(len(boxes), 2, 3)
    for axis, (start, length) in enumerate(((1, 3), (0, 2))):
        theta[:, axis, axis] = boxes[:, length]
        theta[:, axis, 2] = 2 * boxes[:, start] + boxes[:, length] - 1
    grid = F.affine_grid(theta, [len(boxes), 3, SIZE, SIZE], align_corners=False)
    several = (pixels.float() / 255).repeat(draws.views, 1, 1, 1)
    return F.grid_sample(several, grid, mode="bicubic", align_corners=False)


def distort_all(views: Tensor, draws: Draws) -> Tensor:
    """Distort crops [V*B,3,H,W], all in the order of the first."""
    values = values_of(draws, views).flatten(0, 1)

    def chosen(where: np.ndarray) -> Tensor:
        return torch.from_numpy(where.reshape(-1, 1, 1, 1)).to(views.device)

    views = torch.where(chosen(draws.flip), views.flip(-1), views)
    jitter = chosen(draws.jitter)
    for operation in draws.order[0, 0].tolist():
        changed = OPERATIONS[operation](views.clone(), values[:, operation]).clamp_(0, 1)
        views = torch.where(jitter, changed, views)
    views = torch.where(chosen(draws.grey), grey(views), views).clamp_(0, 1)
    soft = blur(views, values[:, 4], radius=RADIUS).clamp_(0, 1)
    return torch.where(chosen(draws.blur), soft, views)


def all_at_once(pixels: Tensor, draws: Draws) -> Tensor:
    views = distort_all(crop_all(pixels, draws), draws)
    return views.contiguous(memory_format=torch.channels_last)


def by_kornia(pixels: Tensor, augmentation: ModuleType) -> Method:
    """Return the official pipeline built of kornia's modules."""
    modules = torch.nn.Sequential(
        augmentation.RandomResizedCrop(
            (SIZE, SIZE), scale=(0.1, 1.0), resample="BICUBIC", cropping_mode="resample"
        ),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur(
            (2 * RADIUS + 1, 2 * RADIUS + 1), (0.1, 2.0), border_type="constant"
        ),
    )

    def views() -> Tensor:
        images = pixels.float() / 255
        both = torch.cat([modules(images), modules(images)])
        return both.contiguous(memory_format=torch.channels_last)

    return views


def methods(pixels: Tensor, draws: Draws) -> dict[str, Method]:
    device = pixels.device
    found: dict[str, Method] = {"plain": lambda: make_views(pixels, draws, SETTINGS, device=device)}
    if device.type == "cuda":
        found["fused"] = lambda: make_views(pixels, draws, SETTINGS, device=device, fused=True)
        found["fused bf16"] = lambda: make_views(
            pixels, draws, SETTINGS, device=device, fused=True, dtype=torch.bfloat16
        )
    found["per image"] = lambda: one_after_another(pixels, draws)
    found["batched"] = lambda: all_at_once(pixels, draws)
    kornia = imported("kornia.augmentation")
    if kornia is not None:
        found["kornia"] = by_kornia(pixels, kornia)
    found["draw"] = lambda: draw(draws.images, pixels.shape[-1])
    found["crop"] = lambda: crops_of(pixels, draws)
    if device.type == "cuda":
        found["fused crop"] = lambda: crops_of(pixels, draws, fused=True)
    return found


def crops_of(pixels: Tensor, draws: Draws, *, fused: bool = False) -> Tensor:
    size = (SIZE, SIZE)
    return crop_resize(pixels, draws.boxes, size, SETTINGS.resize, flip=draws.flip, fused=fused)


def errors(device: torch.device) -> dict[str, float]:
    """Compare crops, and colours and blur on equal crops, with the plain ones in float64."""
    draws = draw(4, SIZE)
    generator = torch.Generator().manual_seed(1)
    crops = torch.rand(2, 4, 3, SIZE, SIZE, generator=generator).to(device)
    one_order = replace(draws, order=np.broadcast_to(draws.order[:1, :1], draws.order.shape))

    def reference(drawn: Draws) -> Tensor:
        return make_views(crops.double(), drawn, SETTINGS, device=device)

    values = values_of(draws, crops)
    pairs = [(view, image) for view in range(2) for image in range(4)]
    found = {
        "plain": make_views(crops, draws, SETTINGS, device=device) - reference(draws),
        "per image": torch.cat(
            [distort_one(crops[pair][None].clone(), draws, *pair, values[pair]) for pair in pairs]
        )
        - reference(draws),
        "batched": distort_all(crops.flatten(0, 1), one_order) - reference(one_order),
    }
    bytes_ = torch.randint(256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    pixels = bytes_.to(device)
    cropped = crops_of(pixels.double() / 255, draws)
    found["crop"] = crops_of(pixels, draws) - cropped
    if device.type == "cuda":
        views = make_views(crops, draws, SETTINGS, device=device, fused=True)
        found["fused"] = views - reference(draws)
        found["fused crop"] = crops_of(pixels, draws, fused=True) - cropped
    largest = {method: float(difference.abs().max()) for method, difference in found.items()}
    wrong = {method: error for method, error in largest.items() if not error < TOLERANCE}
    assert not wrong, f"they compute something else: {wrong}"
    return largest


def seconds_of(method: Method, device: torch.device, calls: int) -> float:
    """Return the seconds of one call; several are sent to a GPU before it is waited for."""
    begin = time.perf_counter()
    for _ in range(calls):
        method()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def measure(
    images: int, *, side: int, device: torch.device, rounds: int, calls: int
) -> list[dict[str, object]]:
    """Measure all methods and print the table."""
    generator = np.random.default_rng(0)
    decoded = generator.integers(0, 256, (images, 3, side, side), dtype=np.uint8)
    pixels = torch.from_numpy(decoded).to(device)
    compared = methods(pixels, draw(images, side))
    for method in compared.values():
        seconds_of(method, device, 1)
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, method in compared.items():
            taken[name].append(seconds_of(method, device, calls) / (2 * images) * 1e6)
    medians = {name: statistics.median(found) for name, found in taken.items()}
    rows: list[dict[str, object]] = []
    print(f"{'method':>10} {'us per view':>12} {'least':>9} {'spread':>7} {'over plain':>11}")
    for name, found in taken.items():
        low, _, high = statistics.quantiles(found, n=4)
        spread, ratio = (high - low) / medians[name], medians[name] / medians["plain"]
        rows.append(
            {
                "method": name,
                "median_microseconds_per_view": round(medians[name], 3),
                "min_microseconds_per_view": round(min(found), 3),
                "spread": round(spread, 3),
                "time_over_plain": round(ratio, 4),
            }
        )
        print(f"{name:>10} {medians[name]:>12.2f} {min(found):>9.2f} {spread:>7.1%} {ratio:>11.3f}")
    return rows


def main() -> None:
    """Measure and write the result file."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256 if has_gpu else 8)
    parser.add_argument("--side", type=int, default=SIZE, help="of the decoded images, in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3 if has_gpu else 1, help="in a round")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for a spread")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if has_gpu else "cpu")
    facts = machine()
    if has_gpu:
        facts["gpu"] = torch.cuda.get_device_name()
    if imported("kornia.augmentation") is not None:
        facts["kornia"] = importlib.metadata.version("kornia")
    result = {
        "command": " ".join(["python", "-m", "benchmarks.augment", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": facts,
        "settings": {
            "image_size": SIZE,
            "side": options.side,
            "images": options.images,
            "views": 2,
            "rounds": options.rounds,
            "calls": options.calls,
            "threads": options.threads,
        },
        "largest_differences_from_float64": errors(device),
        "results": measure(
            options.images,
            side=options.side,
            device=device,
            rounds=options.rounds,
            calls=options.calls,
        ),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
