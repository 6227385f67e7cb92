"""How far the decoders agree with Pillow on the same photographs, pixel by pixel.

    python -m benchmarks.agreement --images FOLDER -o benchmarks/results/agreement.json

Every JPEG of the folder is read once through the loader by each decoder that is installed, two
crops of 224 pixels of it. Order, boxes and flips must be equal to the bit, so one hash of them all
is compared; what decoding and resizing make of the pixels is measured in steps of 1/255.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.loader import CPU, SIDE, VIEWS, files_in, installed, loader_of
from benchmarks.machine import machine
from bigsimclr.augment import ViewSettings
from bigsimclr.data import Source
from bigsimclr.data.folder import training_folder
from bigsimclr.data.loader import view_hash
from bigsimclr.data.steps import Means
from bigsimclr.stages.run_directory import source_commit

BATCH = 50


def compare(
    source: Source, *, decoder: str, batch: int = BATCH, device: torch.device = CPU
) -> dict[str, object]:
    """Read all images of a source by a decoder, for a device, and by Pillow; compare batches."""
    settings = ViewSettings(image_size=SIDE)
    steps = math.ceil(len(source) / batch)
    both = [
        loader_of(source, batch, means, settings).batches(0, steps)
        for means in (Means(decoder=decoder, device=device), Means(decoder="pillow"))
    ]
    total, near, most, pixels, same = 0.0, 0, 0.0, 0, True
    for found, expected in zip(*both, strict=True):
        same = same and view_hash(found) == view_hash(expected)
        difference = torch.abs(found.pixels.cpu() - expected.pixels).numpy() * 255
        total += float(difference.sum(dtype=np.float64))
        # Whole steps are exact in Pillow's 8 bits; a rounding of float32 is not a step more.
        near += int((difference <= 2 + 1e-3).sum())
        most = max(most, float(difference.max()))
        pixels += difference.size
    return {
        "decoder": decoder,
        "images": len(source),
        "views_equal": same,
        "mean_steps": round(total / pixels, 5),
        "share_within_two_steps": round(near / pixels, 6),
        "most_steps": round(most, 2),
    }


def main() -> None:
    """Compare, and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    source = training_folder(options.images, ".", labelled=False)
    if len(source) != len(files_in(options.images)):
        parser.error(f"{options.images}: not all of its images are JPEGs")
    result = {
        "command": " ".join(["python", "-m", "benchmarks.agreement", *sys.argv[1:]]),
        "commit": source_commit(),
        "machine": facts,
        "settings": {"image_size": SIDE, "views": VIEWS},
        "results": [compare(source, decoder=name) for name in installed() if name != "pillow"],
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
