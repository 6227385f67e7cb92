"""Whole JPEGs decoded by nvImageCodec, which reaches a GPU's decoder without DALI.

For `benchmarks.input`. The backends one by one: "hardware" is the engine of a GPU, "cuda" its
multiprocessors after the CPU has read the Huffman codes, "cpu" is the CPU with as many threads as
are named. Each decodes what it can: the engine takes no progressive file, and what is left is
counted.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

BATCH: Final = 64
BACKENDS: Final = {"hardware": "HW_GPU_ONLY", "cuda": "HYBRID_CPU_GPU", "cpu": "CPU_ONLY"}

Decode = Callable[[Sequence[bytes]], list[Any]]  # None where one cannot be decoded


def is_installed() -> bool:
    return bool(importlib.util.find_spec("nvidia")) and bool(
        importlib.util.find_spec("nvidia.nvimgcodec")
    )


def decoder_of(backend: str, threads: int) -> Decode:
    """Return one backend of nvImageCodec, which decodes as the loader does."""
    from nvidia import nvimgcodec

    kind = getattr(nvimgcodec.BackendKind, BACKENDS[backend])
    on_gpu = torch.cuda.is_available()
    decoder = nvimgcodec.Decoder(
        device_id=0 if on_gpu else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=threads,
        backends=[nvimgcodec.Backend(kind)],
        options=":fancy_upsampling=1",
    )
    # Rotations noted in the file are ignored, and everything becomes three channels.
    parameters = nvimgcodec.DecodeParams(
        apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB
    )

    def decode(files: Sequence[bytes]) -> list[Any]:
        streams = [nvimgcodec.CodeStream(file) for file in files]
        found: list[Any] = decoder.decode(streams, params=parameters)
        return found

    return decode


def difference(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.abs(found.astype(np.int16) - expected.astype(np.int16))


def agreement(
    decode: Decode, files: Sequence[bytes], reference: Callable[[bytes], NDArray[np.uint8]]
) -> dict[str, object]:
    """Compare all that is decoded, pixel by pixel, with another decoder, in steps of 1/255."""
    total, near, most, pixels, images = 0, 0, 0, 0, 0
    for at in range(0, len(files), BATCH):
        some = files[at : at + BATCH]
        for file, image in zip(some, decode(some), strict=True):
            if image is None:
                continue
            apart = difference(np.asarray(image.cpu()), reference(file))
            images += 1
            total += int(apart.sum(dtype=np.int64))
            near += int((apart <= 2).sum())
            most = max(most, int(apart.max()))
            pixels += apart.size
    if not images:
        return {"images_decoded": 0}
    return {
        "images_decoded": images,
        "mean_steps": round(total / pixels, 5),
        "share_within_two_steps": round(near / pixels, 6),
        "most_steps": most,
    }


def rate(decode: Decode, files: Sequence[bytes], *, batches: int, rounds: int) -> dict[str, object]:
    """Return decoded images per second: the files again and again, a batch at a time."""
    taken = []
    for _ in range(rounds):
        decode(files[:BATCH])
        _wait()
        begin, images = time.perf_counter(), 0
        for number in range(batches):
            some = [files[(number * BATCH + row) % len(files)] for row in range(BATCH)]
            images += sum(image is not None for image in decode(some))
        _wait()
        taken.append(images / (time.perf_counter() - begin))
    median = statistics.median(taken)
    return {
        "images_per_second": round(median, 1),
        "spread": round((max(taken) - min(taken)) / median, 3),
    }


def measure(
    files: Sequence[bytes],
    reference: Callable[[bytes], NDArray[np.uint8]],
    *,
    workers: Sequence[int],
    batches: int,
    rounds: int,
) -> list[dict[str, object]]:
    """Measure every backend that decodes anything here, and print the table."""
    on_gpu = torch.cuda.is_available()
    rows: list[dict[str, object]] = []
    for backend in BACKENDS if on_gpu else ("cpu",):
        for threads in workers if backend == "cpu" else (max(workers),):
            decode = decoder_of(backend, threads)
            row = {"backend": backend, "threads": threads, **agreement(decode, files, reference)}
            if row["images_decoded"]:
                row |= rate(decode, files, batches=batches, rounds=rounds)
            rows.append(row)
            print(f"nvImageCodec: {row}", flush=True)
    return rows


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
